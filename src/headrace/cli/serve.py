"""``headrace serve``: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from headrace.cli.options import ENGINE_OF_MODEL, takes
from headrace.cli.output import load

Port = typer.Option("--port", min=0, max=65535, help="Port; 0 for any free one.")
ApiKey = typer.Option("--api-key", help="What clients must send.", show_default=False)
Names = typer.Option(
    "--served-model-name", help="Name of the model in the API (repeatable).", show_default=False
)
Drain = typer.Option(
    "--drain-seconds", min=0, help="How long requests may go on after SIGTERM or Ctrl-C."
)


@takes(engine=ENGINE_OF_MODEL)
def serve(
    engine: dict[str, Any],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Port] = 8000,
    api_key: Annotated[str | None, ApiKey] = None,
    served_model_name: Annotated[list[str] | None, Names] = None,
    drain_seconds: Annotated[float, Drain] = 30.0,
) -> None:
    """Serve MODEL with OpenAI's HTTP API: completions, chat, streaming, metrics."""
    from headrace import server
    from headrace.llm import AsyncLLM

    with server.bind(host, port) as listener:
        server.serve(
            load(AsyncLLM, engine),
            host,
            port,
            api_key,
            model_names=served_model_name,
            drain_seconds=drain_seconds,
            listener=listener,
        )
