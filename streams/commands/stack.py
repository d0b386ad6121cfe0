"""`churnstream stack`: Kafka and Redis on this machine, without containers and without a system Java."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.callback()
def group() -> None:
    """Start, look at and stop Kafka and Redis on this machine.

    KAFKA_BOOTSTRAP_SERVERS and REDIS_URL, when set, are used instead and nothing is started for them.
    """


@app.command(epilog="Example: churnstream stack up --json")
def up(json_output: Json = False) -> None:
    """Start what does not run yet and wait until it answers. A second call changes nothing."""
    from streams.console import Console
    from streams.settings import load
    from streams.stack import up as start
    from streams.stack import without_password

    settings = load()
    console = Console(json_output=json_output)
    done = start(settings)
    redis = without_password(done.endpoints.redis)
    if done.started:
        console.say(f"started {' and '.join(done.started)} in {done.seconds:.1f} s, data under {settings.data_dir}")
    else:
        console.say("already up")
    console.say(f"Kafka {done.endpoints.kafka}")
    console.say(f"Redis {redis}")
    console.result({"kafka": done.endpoints.kafka, "redis": redis, "started": list(done.started), "seconds": round(done.seconds, 3)})


@app.command(epilog="Example: churnstream stack status")
def status(json_output: Json = False) -> None:
    """What runs and where. Exit code 1 when a server that is needed does not run."""
    from streams.console import Console
    from streams.settings import load
    from streams.stack import check, from_settings

    settings = load()
    console = Console(json_output=json_output)
    check(settings)
    stack = from_settings(settings)
    running = {server.name: server for server in stack.status()}
    rows: list[dict[str, object]] = []
    for name in ("kafka", "redis"):
        if name not in stack.servers:
            rows.append({"server": name, "state": "environment", "address": None, "pid": None, "log": None})
        elif server := running.get(name):
            rows.append({"server": name, "state": "running", "address": server.address, "pid": server.pid, "log": server.log})
        else:
            rows.append({"server": name, "state": "stopped", "address": None, "pid": None, "log": None})
    console.table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    console.result({"servers": rows})
    if any(row["state"] == "stopped" for row in rows):
        raise typer.Exit(1)


@app.command(epilog="Example: churnstream stack down")
def down(json_output: Json = False) -> None:
    """Stop the servers cleanly. Their data stays and is there after the next `up`."""
    from streams.console import Console
    from streams.settings import load
    from streams.stack import Stack

    console = Console(json_output=json_output)
    stopped = Stack(load().data_dir).down()
    console.say(f"stopped {' and '.join(server.name for server in stopped)}" if stopped else "nothing was running")
    console.result({"stopped": [server.name for server in stopped]})


@app.command(epilog="Example: churnstream stack fetch")
def fetch(json_output: Json = False) -> None:
    """Get the jars of Kafka, check them against deploy/kafka.lock, and prepare a quick start. Part of `make setup`."""
    from streams.console import Console
    from streams.jars import fetch as fetch_jars
    from streams.stack import prepare_jvm

    console = Console(json_output=json_output)
    directory, fetched = fetch_jars()
    seconds = prepare_jvm()
    console.say(f"{fetched} jars fetched, the others were there; start caches in {seconds:.1f} s; all under {directory}")
    console.result({"fetched": fetched, "directory": str(directory), "prepare_seconds": round(seconds, 3)})


@app.command(epilog="Example: churnstream stack lock")
def lock(json_output: Json = False) -> None:
    """Resolve the broker's jars anew and rewrite deploy/kafka.lock (for a new Kafka version)."""
    from streams.console import Console
    from streams.jars import LOCK, write_lock

    console = Console(json_output=json_output)
    count = write_lock()
    console.say(f"{count} jars locked in {LOCK.name}")
    console.result({"jars": count})
