"""Running the server: its port, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from headrace.errors import ConfigurationError
from headrace.server.app import DEFAULT_MAX_BODY_BYTES, create_app

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
    """Reserve an address, before the work of loading a model. Connections are refused until
    ``serve`` takes the socket.

    Args:
        port: 0 for any free one.

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
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    drain_seconds: float = 30.0,
    listener: socket.socket | None = None,
) -> None:
    """Serve ``llm`` until SIGINT or SIGTERM, then close it and return.

    A signal stops new connections at once; running requests may finish.

    Args:
        model_names: names of the model in the API; its own by default.
        drain_seconds: what still runs this long after the signal ends with an error.
        listener: what ``bind`` returned for this host and port; bound now by default.

    Raises:
        ConfigurationError: the address is in use or cannot be had, or the API key is empty.
    """
    with contextlib.closing(llm), listener or bind(host, port) as listening:
        app = create_app(
            llm,
            api_key=api_key,
            model_names=tuple(model_names or (llm.model_info.name,)),
            max_body_bytes=max_body_bytes,
        )
        try:
            listening.listen(_BACKLOG)
        except OSError as error:
            raise _unavailable(listening.getsockname(), error) from None
        url = _url(listening)
        print(f"serving {llm.model_info.name} at {url}", file=sys.stderr, flush=True)
        DrainingServer(app, llm, drain_seconds).run([listening])


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class DrainingServer(uvicorn.Server):
    """A uvicorn server that lets running requests finish and then ends without complaint.

    Args:
        drain_seconds: how long they may take after a signal.
    """

    def __init__(self, app: FastAPI, llm: AsyncLLM, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
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
        )
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

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests to drain; uvicorn would raise them again later."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
