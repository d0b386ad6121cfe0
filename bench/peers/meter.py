"""What engines, broker, Redis and the network use while something runs, from /proc and the servers' own counters."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

TICKS: Final = os.sysconf("SC_CLK_TCK")


def pids_of_session(leader: int) -> list[int]:
    """The processes of a session: an engine started with `start_new_session` and all it started."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) and int(stat[3]) == leader:
            found.append(int(entry.name))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far, 0 when it has ended."""
    stat = _stat(pid)
    return (int(stat[11]) + int(stat[12])) / TICKS if stat else 0.0


def machine_seconds() -> float:
    """CPU time of the whole machine so far."""
    times = [int(x) for x in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]]
    return (sum(times[:8]) - times[3] - times[4]) / TICKS


def resident_mb(pids: list[int]) -> float:
    """Resident memory now, MB."""
    total = 0
    for pid in pids:
        try:
            total += int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        except OSError:
            continue
    return total * os.sysconf("SC_PAGE_SIZE") / 1e6


def loopback_bytes() -> int:
    """Bytes received on the loopback interface so far, headers included: each byte between two processes here is counted once."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "lo":
            return int(rest.split()[0])
    return 0


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


@dataclass(frozen=True, slots=True)
class Reading:
    """All counters at one moment: seconds of the monotonic clock, CPU seconds, bytes, resident MB of the engine."""

    at_s: float
    engine: float
    broker: float
    redis: float
    machine: float
    network: int
    redis_network: int
    resident_mb: float

    def since(self, before: Reading) -> Reading:
        """What came to be between two readings; memory as it is now."""
        values = {f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(Reading)}
        return Reading(**{**values, "resident_mb": self.resident_mb})


@dataclass(slots=True)
class Meter:
    """Reads the counters of one engine (the session led by `engine`) and of the servers (pids by name)."""

    engine: int
    servers: dict[str, int]
    redis: Any
    peak_mb: float = field(default=0.0)
    _cpu: dict[int, float] = field(default_factory=dict)

    def read(self) -> Reading:
        """The counters now."""
        pids = pids_of_session(self.engine)
        # A process that ends keeps what it has used: a sum over those alive would go down.
        for pid in pids:
            self._cpu[pid] = max(self._cpu.get(pid, 0.0), cpu_seconds(pid))
        resident = resident_mb(pids)
        self.peak_mb = max(self.peak_mb, resident)
        info = self.redis.info("stats")
        return Reading(
            at_s=time.monotonic(),
            engine=sum(self._cpu.values()),
            broker=cpu_seconds(self.servers.get("kafka", 0)),
            redis=cpu_seconds(self.servers.get("redis", 0)),
            machine=machine_seconds(),
            network=loopback_bytes(),
            redis_network=info["total_net_input_bytes"] + info["total_net_output_bytes"],
            resident_mb=resident,
        )
