"""The command `churnstream`: its groups, its errors as one line each, its exit codes."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from proto.errors import BadInput, BadUsage, ChurnError, DependencyUnreachable

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_DATA, EXIT_INTERRUPTED = 1, 2, 3, 4, 130


class Group(NamedTuple):
    """One line of the root's help. The module is imported only when the command is called; it has `app`, a typer.Typer."""

    module: str
    help: str


# In the order a newcomer meets them. A Typer with exactly one command and no callback becomes that command (`churnstream demo`).
GROUPS: dict[str, Group] = {
    "demo": Group("streams.commands.demo", "The whole service on this machine, on real invoices."),
    "stack": Group("streams.commands.stack", "Start, look at and stop Kafka and Redis on this machine."),
    "topics": Group("streams.commands.topics", "Create the topics, or say what would be created."),
    "features": Group("streams.commands.features", "List the features, check them against the oracle, write their page."),
    "worker": Group("streams.commands.worker", "Score events as they come."),
    "serve": Group("streams.commands.serve", "Answer lookups by gRPC and REST."),
    "feed": Group("streams.commands.feed", "Send the rows of files as events."),
    "simulate": Group("streams.commands.simulate", "A population with known causes, as files or on the topics."),
    "models": Group("streams.commands.models", "Train models, publish them, see how good they are."),
    "keys": Group("streams.commands.keys", "The key pairs models are signed with."),
    "dlq": Group("streams.commands.dlq", "Look at the records that could not be used, send them back."),
    "schema": Group("streams.commands.schema", "The contracts of events and scores as JSON Schema."),
    "state": Group("streams.commands.state", "Look at what is stored of a customer."),
    "backfill": Group("streams.commands.backfill", "Fill empty state with history from files."),
    "snapshot": Group("streams.commands.snapshot", "Keep the state in files, to rebuild from."),
    "verify": Group("streams.commands.verify", "Prove that what was emitted is what the topics say."),
    "explain": Group("streams.commands.explain", "Why a customer was scored so, then; the score made again."),
    "replay": Group("streams.commands.replay", "What another model would have said, beside what was scored."),
    "changes": Group("streams.commands.changes", "Why scores moved: events, time, corrections, models."),
    "backtest": Group("streams.commands.backtest", "How good models would have been, period after period."),
    "tail": Group("streams.commands.tail", "Show the last scores, or follow them."),
    "status": Group("streams.commands.status", "Where the deployment stands: partitions, lag, model."),
    "doctor": Group("streams.commands.doctor", "Whether everything is there that the service needs."),
    "drift": Group("streams.commands.drift", "Whether scores, features and records have moved, and why."),
    "outcomes": Group("streams.commands.outcomes", "What became of the scored customers, and how good the scores were."),
    "config": Group("streams.commands.config", "Show every setting and where its value comes from."),
}

# "\b" keeps the line breaks of the paragraph it opens.
EPILOG = """\b
Examples:
  churnstream demo                                    the whole way, from nothing to live scores
  churnstream stack up                                start Kafka and Redis here
  churnstream topics create --dry-run                 what would be created
  churnstream --set partitions=8 config show          a setting for one call

\b
Exit codes:
  0    done
  1    failed, or a check did not pass
  2    wrong usage
  3    Kafka or Redis does not answer
  4    the data is invalid
  130  interrupted
"""


class LazyGroup(TyperGroup):
    """The root: knows its commands by name and help line, and imports one only to run it."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, group in GROUPS.items():
            self.commands.setdefault(name, TyperCommand(name, help=group.help, add_help_option=False))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # Any: typer keeps its copy of click private
        """As the base class, with the stand-in replaced by the real command."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in GROUPS:
            command = typer.main.get_command(import_module(GROUPS[name].module).app)
            command.name = name
            command.help = command.help or GROUPS[name].help
            _plain(command)
        return name, command, rest


def _plain(command: Any) -> None:
    """Help as plain text: drawing it with rich costs 0.25 s of the 0.4 s a help page may take."""
    command.rich_markup_mode = None
    for sub in getattr(command, "commands", {}).values():
        _plain(sub)


app = typer.Typer(cls=LazyGroup, name="churnstream", epilog=EPILOG, no_args_is_help=True, rich_markup_mode=None)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"churnstream {installed_version('churnstream')}")
        raise typer.Exit


@app.callback()
def root(
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file of settings (else CHURN_CONFIG, else ./churnstream.toml).")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One setting for this call; may be repeated.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Live churn scores, with reasons, from the event streams of a business."""
    if config is not None or assignments:
        from streams.settings import use_command_line

        use_command_line(config, assignments or [])


def exit_code(error: BaseException) -> int:
    """The exit code that stands for an error."""
    match error:
        case BadUsage():
            return EXIT_USAGE
        case BadInput():
            return EXIT_DATA
        case DependencyUnreachable():
            return EXIT_UNREACHABLE
        case _:
            return EXIT_FAILED


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:] if argv is None else argv
    # Asked before parsing, because parsing itself may fail.
    debug = "--debug" in arguments
    code: int
    try:
        typer.main.get_command(app).main(arguments, prog_name="churnstream")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_FAILED
    except ChurnError as error:
        if debug:
            raise
        print(f"churnstream: {error}", file=sys.stderr)
        code = exit_code(error)
    except Exception as error:
        if debug:
            raise
        print(f"churnstream: internal error: {type(error).__name__}: {error}; run again with --debug for the traceback", file=sys.stderr)
        code = EXIT_FAILED
    _flush_quietly()
    sys.exit(code)


def _flush_quietly() -> None:
    """A reader that went away (`| head`) is no error; without this the interpreter would complain at its end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
