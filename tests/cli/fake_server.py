"""A tiny server that speaks just enough of OpenAI's protocol for the load client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Answers every request with as many pieces as it asks for; notes what it was asked.

    A prompt that starts with the token 0 is refused, one that starts with 1 is cut off, and one
    that starts with 2 is answered with something that is no JSON.
    """

    bodies: list[dict[str, Any]]
    keys: list[str | None]

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append({"path": self.path, **body})
        self.keys.append(self.headers.get("Authorization"))
        start = body["prompt"][0] if "prompt" in body else None
        if start == 0:
            self._send(429, {"error": {"message": "later"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for _ in range(body["max_tokens"]):
            choice = {"text": "x"} if "prompt" in body else {"delta": {"content": "x"}}
            self._event({"choices": [{"index": 0, **choice}]})
        if start == 1:
            return
        if start == 2:
            self.wfile.write(b"data: {oops\n\n")
        length = len(body.get("prompt") or "chat")
        usage = {"prompt_tokens": length, "completion_tokens": body["max_tokens"]}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()


@contextmanager
def fake_server() -> Iterator[tuple[str, type[Handler]]]:
    """The address of a running server, and its handler class with what it received."""
    handler = type("Recording", (Handler,), {"bodies": [], "keys": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", handler
        finally:
            server.shutdown()
            thread.join()
