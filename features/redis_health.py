"""What a redis-server says of itself, and what of that is a reason not to trust it with state, or to warn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import NoPermissionError

Version = tuple[int, ...]

OLDEST: Final[dict[Version, Version]] = {(7, 2): (7, 2, 11), (7, 4): (7, 4, 6), (8, 0): (8, 0, 4), (8, 2): (8, 2, 2)}
"""First release of each series whose Lua engine, which runs our functions, lets nobody out (CVE-2025-49844, -46817, -46818)."""
FULL: Final = 0.8
"""Share of maxmemory from which a warning is due."""


@dataclass(frozen=True, slots=True)
class Health:
    """One server. version: "" when this user may not ask. limit_bytes: its maxmemory, 0 = none."""

    address: str
    version: str = ""
    used_bytes: int = 0
    limit_bytes: int = 0
    policy: str = "noeviction"
    writes_fail: str = ""  # why it refuses writes, "" when it takes them

    @property
    def filled(self) -> float:
        """Share of maxmemory in use, 0 without a limit."""
        return self.used_bytes / self.limit_bytes if self.limit_bytes else 0.0


def ask(client: Any) -> Health:
    """Ask one server. Raises what the library does when it does not answer."""
    known = client.connection_pool.connection_kwargs
    address = known["path"] if "path" in known else f"{known.get('host', 'localhost')}:{known.get('port', 6379)}"
    try:
        text: bytes = client.execute_command("INFO", "server", "memory", "persistence")
    except NoPermissionError:
        return Health(address)
    said = dict(line.split(":", 1) for line in text.decode("utf-8", "replace").splitlines() if ":" in line)
    failing = [name for name in ("aof_last_write_status", "rdb_last_bgsave_status") if said.get(name, "ok") != "ok"]
    return Health(
        address=address,
        version=said.get("redis_version", ""),
        used_bytes=int(said.get("used_memory", 0)),
        limit_bytes=int(said.get("maxmemory", 0)),
        policy=said.get("maxmemory_policy", "noeviction"),
        writes_fail=", ".join(f"{name} is {said[name]}" for name in failing),
    )


def parse_version(text: str) -> Version:
    """(8, 2, 3) for "8.2.3". Raises ValueError."""
    return tuple(int(part) for part in text.split("."))


def refusal(health: Health, oldest: str) -> str:
    """Why this server must not hold state, "" when it may. oldest: a version to demand instead of OLDEST, "" = none."""
    if health.version:
        version = parse_version(health.version)
        if oldest:
            floor: Version | None = parse_version(oldest)
        else:  # a series without a release of its own in the table is measured by the next one; a newer one than all was never open
            floor = next((first for series, first in sorted(OLDEST.items()) if series >= version[:2]), None)
        if floor is not None and version < floor:
            needed = ".".join(map(str, floor))
            return (
                f"redis-server {health.version} is older than {needed}: anybody who may call a function can leave its Lua engine; "
                "update it, or set redis_oldest_version when your distribution has patched it"
            )
    if health.limit_bytes and health.policy.startswith("allkeys-"):
        return f"its maxmemory-policy is {health.policy}: it would throw state away when full; set noeviction"
    return ""
