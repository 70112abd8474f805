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
Adapters = typer.Option(
    "--adapter",
    metavar="NAME=PATH",
    help="A PEFT adapter, chosen by requests as their model (repeatable).",
    show_default=False,
)
Updates = typer.Option(
    "--allow-adapter-updates", help="Let clients load and unload adapters of this machine."
)


def parse_adapters(texts: list[str]) -> dict[str, str]:
    """Name -> path, out of ``NAME=PATH`` each. Raises BadParameter."""
    adapters: dict[str, str] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise typer.BadParameter(f"{text!r} is no adapter; write NAME=PATH")
        if name in adapters:
            raise typer.BadParameter(f"two adapters are called {name!r}; give each its own name")
        adapters[name] = path
    return adapters


@takes(engine=ENGINE_OF_MODEL)
def serve(
    engine: dict[str, Any],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Port] = 8000,
    api_key: Annotated[str | None, ApiKey] = None,
    served_model_name: Annotated[list[str] | None, Names] = None,
    drain_seconds: Annotated[float, Drain] = 30.0,
    adapter: Annotated[list[str] | None, Adapters] = None,
    allow_adapter_updates: Annotated[bool, Updates] = False,
) -> None:
    """Serve MODEL with OpenAI's HTTP API: completions, chat, embeddings, streaming, metrics."""
    from headrace import server
    from headrace.llm import AsyncLLM

    adapters = parse_adapters(adapter or [])
    with server.bind(host, port) as listener:
        server.serve(
            load(AsyncLLM, {**engine, "adapters": adapters} if adapters else engine),
            host,
            port,
            api_key,
            model_names=served_model_name,
            drain_seconds=drain_seconds,
            listener=listener,
            allow_adapter_updates=allow_adapter_updates,
        )
