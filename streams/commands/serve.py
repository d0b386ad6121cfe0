"""`churnstream serve`: lookups by gRPC and REST."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer()


@app.command(epilog="Example: CHURN_SERVE_REFLECTION=true churnstream serve")
def serve(
    grpc_port: Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port of gRPC; the default is CHURN_SERVE_GRPC_PORT.")] = None,
    rest_port: Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port of REST; the default is CHURN_SERVE_REST_PORT.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Say where it listens as one JSON object.")] = False,
) -> None:
    """Answer lookups of scores, reasons, features and facts until SIGTERM or Ctrl-C, by gRPC (50051) and REST (8000).

    Without tokens only this machine may ask. The methods, roles and a session to try: docs/lookups.md.
    """
    import sys

    from streams.console import Console
    from streams.settings import load
    from streams.stack import endpoints
    from streams.topics import client_config

    settings = load(serve_grpc_port=grpc_port, serve_rest_port=rest_port)
    where = endpoints(settings)

    from streams.serve import Addresses, Service, log_to_stderr

    log_to_stderr(settings.log_level)
    console = Console(json_output=json_output)

    def started(addresses: Addresses) -> None:
        console.say(f"gRPC on {addresses.grpc}, REST on {addresses.rest}")
        console.result({"grpc": addresses.grpc, "rest": addresses.rest})
        sys.stdout.flush()

    Service(settings, client_config(settings, where.kafka), where.redis).run(started)
