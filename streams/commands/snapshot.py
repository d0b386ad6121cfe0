"""`churnstream snapshot`: the state of partitions in files, to rebuild from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from streams.settings import Settings
    from streams.snapshot import Snapshots

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Partitions = Annotated[list[int] | None, typer.Option("--partition", min=0, help="Only this one; may be repeated.")]


@app.callback()
def group() -> None:
    """Snapshots of the state (docs/rebuild.md). A running worker takes its own every CHURN_SNAPSHOT_INTERVAL_S."""


@app.command(epilog="Example: churnstream --set snapshot_dir=/var/lib/churn/snapshots snapshot take")
def take(partition: Partitions = None, json_output: Json = False) -> None:
    """Take a snapshot of every partition that nobody is writing to. Exit code 1 when one was written to meanwhile."""
    import time

    from proto.errors import ChurnError
    from streams.console import Console
    from streams.settings import load
    from streams.snapshot import read
    from streams.snapshot import take as take_one
    from streams.stack import endpoints
    from streams.state_store import open_store

    settings = load()
    console = Console(json_output=json_output)
    snapshots = _snapshots(settings)
    store = open_store(settings, endpoints(settings).redis, patience_s=0)
    began = time.monotonic()
    taken, empty, failed = [], [], []
    try:
        for number in partition or range(settings.partitions):
            if store.look(number).fresh:
                empty.append(number)
                continue
            try:
                path = take_one(store, snapshots, number, time.time_ns() // 1_000_000)
            except ChurnError as error:
                failed.append({"partition": number, "why": str(error)})
                console.say(str(error))
                continue
            found = read(path)
            taken.append({"partition": number, "path": str(path), "customers": found.stand.customers, "bytes": found.bytes})
            console.say(f"partition {number}: {found.stand.customers:,} customers, {found.bytes:,} bytes: {path}")
    finally:
        store.close()
    for number in empty:
        console.say(f"partition {number}: nothing is stored")
    seconds = round(time.monotonic() - began, 3)
    console.result({"taken": taken, "empty": empty, "failed": failed, "seconds": seconds})
    if failed:
        raise ChurnError(f"{len(failed)} partitions have no new snapshot")


@app.command("list", epilog="Example: churnstream snapshot list")
def list_(partition: Partitions = None, json_output: Json = False) -> None:
    """The snapshots there are, the latest state of each partition first."""
    from datetime import UTC, datetime

    from streams.console import Console
    from streams.settings import load
    from streams.snapshot import describe

    settings = load()
    console = Console(json_output=json_output)
    snapshots = _snapshots(settings)
    found = [snapshot for number in partition or snapshots.partitions() for snapshot in snapshots.of(number)]
    if not json_output:
        console.table(
            ("partition", "taken", "customers", "bytes", "offsets", "file"),
            [
                (
                    one.stand.partition,
                    datetime.fromtimestamp(one.stand.taken_ms / 1_000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
                    one.stand.customers,
                    one.bytes,
                    " ".join(f"{name}={offset}" for name, offset in one.stand.applied.items()),
                    one.path.name,
                )
                for one in found
            ],
        )
    console.result({"snapshots": [describe(one) for one in found]})


@app.command(epilog="Example: churnstream snapshot verify --json")
def verify(partition: Partitions = None, json_output: Json = False) -> None:
    """Check every snapshot: the digest over all bytes, and every customer's own checksum. Exit code 4 when one is damaged."""
    from proto.errors import BadInput, ChurnError
    from streams.console import Console
    from streams.settings import load
    from streams.snapshot import SUFFIX, check

    settings = load()
    console = Console(json_output=json_output)
    snapshots = _snapshots(settings)
    results = []
    for number in partition or snapshots.partitions():
        for path in sorted(snapshots.place(number).glob(f"*{SUFFIX}"), reverse=True):
            try:
                customers = check(path)
            except (ChurnError, OSError) as error:
                results.append({"path": str(path), "good": False, "why": str(error)})
                console.say(f"{path}: damaged: {error}")
            else:
                results.append({"path": str(path), "good": True, "customers": customers})
                console.say(f"{path}: good, {customers:,} customers")
    bad = sum(not result["good"] for result in results)
    console.result({"snapshots": results, "damaged": bad})
    if bad:
        raise BadInput(f"{bad} of {len(results)} snapshots are damaged; a rebuild uses the one before")


def _snapshots(settings: Settings) -> Snapshots:
    from proto.errors import BadUsage
    from streams.snapshot import Snapshots

    if settings.snapshot_dir is None:
        raise BadUsage("no directory of snapshots: set CHURN_SNAPSHOT_DIR")
    return Snapshots(settings.snapshot_dir, settings.namespace, settings.snapshot_keep)
