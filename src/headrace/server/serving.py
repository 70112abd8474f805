"""Running the server: its port, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import signal
import socket
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from headrace.errors import ConfigurationError
from headrace.server.app import create_app

if TYPE_CHECKING:
    from headrace.llm import AsyncLLM

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75
_CLOSING_SECONDS = 2
_FIXES = {
    errno.EADDRINUSE: "the port is in use; stop what uses it or choose another with --port",
    errno.EACCES: "not permitted; choose a port above 1023 with --port",
    errno.EADDRNOTAVAIL: "this machine has no such address; choose another with --host",
}


def bind(host: str = "127.0.0.1", port: int = 8000) -> socket.socket:
    """Reserve an address (port 0: any free one), before the work of loading a model. Connections
    are refused until ``serve`` takes the socket.

    Raises:
        ConfigurationError: the address is in use or cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigurationError(f"host: cannot resolve {host!r}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _unavailable(address, error) from None
    return listener


def _unavailable(address: tuple[Any, ...], error: OSError) -> ConfigurationError:
    host, port = address[:2]
    fix = _FIXES.get(error.errno or 0, error.strerror)
    return ConfigurationError(f"port: cannot listen on {host}:{port}: {fix}")


def serve(
    llm: AsyncLLM,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    *,
    model_names: Sequence[str] | None = None,
    drain_seconds: float = 30.0,
    listener: socket.socket | None = None,
    allow_adapter_updates: bool = False,
) -> None:
    """Serve ``llm`` until SIGINT or SIGTERM, then close it and return.

    Args:
        model_names: names of the model in the API; its own by default.
        drain_seconds: what still runs this long after the signal ends with an error.
        listener: what ``bind`` returned for this host and port; bound now by default.
        allow_adapter_updates: whether clients may load and unload adapters.

    Raises:
        ConfigurationError: the address is in use or cannot be had, or the API key is empty.
    """
    with contextlib.closing(llm), listener or bind(host, port) as listening:
        app = create_app(
            llm,
            api_key=api_key,
            model_names=model_names or [llm.model_info.name],
            allow_adapter_updates=allow_adapter_updates,
        )
        host, port = listening.getsockname()[:2]
        try:
            listening.listen(_BACKLOG)
        except OSError as error:
            raise _unavailable((host, port), error) from None
        shown = f"[{host}]" if ":" in host else host
        name = llm.model_info.name
        print(f"serving {name} at http://{shown}:{port}/v1", file=sys.stderr, flush=True)
        DrainingServer(app, llm, drain_seconds).run([listening])


class DrainingServer(uvicorn.Server):
    """A uvicorn server that lets running requests finish, for ``drain_seconds`` at most, and then
    ends without complaint.
    """

    def __init__(self, app: FastAPI, llm: AsyncLLM, drain_seconds: float) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(drain_seconds) + _CLOSING_SECONDS,
        )
        super().__init__(config)
        self._llm = llm
        self._drain_seconds = drain_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        draining.cancel()  # every request has ended, or is not to be waited for
        with contextlib.suppress(asyncio.CancelledError):
            await draining

    async def _drain(self) -> None:
        await self._llm.drain(self._drain_seconds)
        await asyncio.to_thread(self._llm.close)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, or end at once; uvicorn's own would raise the signal again after that."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
