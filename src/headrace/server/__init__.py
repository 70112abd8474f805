"""The HTTP face: an OpenAI-compatible server over ``AsyncLLM``."""

from __future__ import annotations

from headrace.server.app import create_app
from headrace.server.serving import bind, serve

__all__ = ["bind", "create_app", "serve"]
