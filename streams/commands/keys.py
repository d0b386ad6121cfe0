"""`churnstream keys`: the pairs models are signed with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


@app.callback()
def group() -> None:
    """Make the key pairs models are signed with, and see which count."""


@app.command(epilog="Example: churnstream keys create ~/.config/churnstream --owner ada")
def create(
    directory: Annotated[Path, typer.Argument(help="Where the pair goes: signing.pem, readable by you alone, and trusted.pub.")],
    owner: Annotated[str | None, typer.Option(help="Whose key it is; default: CHURN_MODEL_SIGNER, else the user's name.")] = None,
    json_output: Json = False,
) -> None:
    """Make an Ed25519 pair. Publishers keep signing.pem to themselves; workers get trusted.pub, one file per person."""
    from models import signature
    from streams.console import Console
    from streams.publishing import signer
    from streams.settings import load

    console = Console(json_output=json_output)
    public = signature.create(directory, owner or signer(load(), signature.Trust()).owner)
    private, trusted = directory / signature.PRIVATE_FILE, directory / signature.PUBLIC_FILE
    console.say(f"key {public.key_id} of {public.owner}")
    console.say(f"  publish and approve with   CHURN_MODEL_SIGNING_KEY_FILE={private}")
    console.say(f"  workers trust it with      CHURN_MODEL_PUBLIC_KEYS={trusted}")
    console.result({"key_id": public.key_id, "owner": public.owner, "private": str(private), "public": str(trusted)})


@app.command("list", epilog="Example: churnstream keys list")
def list_keys(json_output: Json = False) -> None:
    """The keys whose signatures count here, and whether decisions need two persons."""
    from streams.console import Console
    from streams.publishing import trust
    from streams.settings import load

    console = Console(json_output=json_output)
    believed = trust(load())
    keys = [{"key_id": key.key_id, "owner": key.owner} for key in believed.keys.values()]
    if keys:
        console.table(("key", "owner"), [(key["key_id"], key["owner"]) for key in keys])
    else:
        console.say("signatures are not checked: no public keys are configured (CHURN_MODEL_PUBLIC_KEYS)")
    console.result({"keys": keys, "two_persons": believed.two_persons})
