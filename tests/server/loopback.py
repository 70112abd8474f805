"""A server on a free port of this machine, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headrace.server import bind, create_app
from headrace.server.serving import DrainingServer


@contextmanager
def serving(llm: Any, **options: Any) -> Iterator[str]:
    """Serve ``llm`` as ``headrace serve`` does; yields the base URL."""
    app = create_app(llm, **{"model_names": ("fake", "alias"), **options})
    with bind(port=0) as listener:
        server = DrainingServer(app, llm, drain_seconds=30)
        thread = threading.Thread(target=server.run, args=([listener],))
        host, port = listener.getsockname()
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://{host}:{port}"
        finally:
            server.should_exit = True
            thread.join()


def wait_until(condition: Any, seconds: float = 30) -> None:
    """Poll until ``condition()`` holds; fail when it does not within a generous time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
