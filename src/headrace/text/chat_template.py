"""Chat templates: Jinja programs that come with a checkpoint, run in a sandbox.

The sandbox keeps a template from Python's internals, and it sees plain JSON values only. What it
takes in time and memory is not limited: an endless template is the checkpoint's fault.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.errors import CheckpointError, InvalidRequestError
from headrace.json_file import read_json


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja text.
        origin: the file it comes from, for error messages.

    Raises:
        CheckpointError: the template is not valid Jinja.
    """

    def __init__(self, source: str, origin: Path) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.now().strftime(form),
        }
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(
                f"the chat template in {origin} is not valid: {error}; fix it or remove it"
            ) from error

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt for a conversation.

        Args:
            messages: as in OpenAI's API; entries that are ``None`` count as absent.
            variables: what the template may use beside ``messages``.

        Raises:
            InvalidRequestError: of ``messages``, when the template refuses or fails on them; of a
                variable, when it is not a JSON value.
        """
        try:
            values = {name: _plain(value, name) for name, value in variables.items()}
            values["messages"] = [_message(message) for message in messages]
            return self._template.render(values)
        except InvalidRequestError:
            raise
        except Exception as error:  # a template can raise whatever Python can
            raise InvalidRequestError("messages", f"the chat template refuses: {error}") from error


def load_chat_templates(directory: Path, configured: Any) -> dict[str, ChatTemplate]:
    """The templates of a checkpoint by name; the usual one is called "default".

    Files of their own come before ``configured``, the entry of ``tokenizer_config.json``.

    Raises:
        CheckpointError: a template is damaged.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        files = {"default": file}
        for other in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            files[other.stem] = other
        return {name: ChatTemplate(_read(path), path) for name, path in files.items()}
    origin = directory / "tokenizer_config.json"
    file = directory / "chat_template.json"
    if file.is_file():
        origin, configured = file, read_json(file).get("chat_template")
    if configured is None:
        return {}
    if isinstance(configured, str):
        configured = [{"name": "default", "template": configured}]
    try:
        sources = {entry["name"]: entry["template"] for entry in configured}
    except (TypeError, KeyError):
        sources = {None: None}
    if not all(isinstance(text, str) for pair in sources.items() for text in pair):
        raise CheckpointError(
            f"chat_template in {origin} must be a string or a list of objects with a name and a "
            "template; fetch the file again"
        )
    return {name: ChatTemplate(source, origin) for name, source in sources.items()}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from error


def _message(message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError("messages", "each message must be an object with a role")
    return {n: _plain(value, "messages") for n, value in message.items() if value is not None}


def _plain(value: object, field: str) -> Any:
    """A copy in plain JSON types: other objects have methods that the sandbox does not know."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(item, field) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, field) for item in value]
    raise InvalidRequestError(field, f"{type(value).__name__} is not a JSON value")


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's part for training; here it only renders it."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as it is; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
