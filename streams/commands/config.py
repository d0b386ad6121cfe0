"""`churnstream config`: every setting with its value and where that came from."""

from __future__ import annotations

from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True)


@app.callback()
def group() -> None:
    """Show every setting and where its value comes from (flag > environment > file > default)."""


@app.command(epilog="Example: CHURN_PARTITIONS=8 churnstream config show")
def show(json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False) -> None:
    """Every setting: value (secrets masked), origin, environment variable, meaning."""
    from pydantic import SecretStr

    from streams.console import Console
    from streams.settings import KAFKA_SECRETS, Settings, load_with_origins, variable

    def shown(value: object) -> Any:
        if isinstance(value, SecretStr):
            return "***" if value.get_secret_value() else ""
        if isinstance(value, dict):
            return {k: "***" if k in KAFKA_SECRETS else str(v) for k, v in value.items()}
        return value if isinstance(value, int | float) else str(value)

    loaded = load_with_origins()
    console = Console(json_output=json_output)
    rows = [
        (name, shown(getattr(loaded.settings, name)), loaded.origins[name], variable(name), field.description)
        for name, field in Settings.model_fields.items()
    ]
    console.table(("setting", "value", "origin", "variable", "meaning"), rows)
    console.result({"settings": {name: {"value": value, "origin": origin} for name, value, origin, *_ in rows}})
