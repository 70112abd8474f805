"""Chat templates: Jinja programs that come with a checkpoint, run in a sandbox.

The sandbox keeps a template from Python's internals, and it sees plain JSON values only. How far it
is kept from filling the machine, ``template_bounds`` says.
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

from headrace.errors import CheckpointError, InvalidRequestError
from headrace.json_file import read_json
from headrace.text.template_bounds import BoundedEnvironment

_LONGEST_REASON = 1000
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called; templates read it by one of the first two names."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja text.
        origin: the file it comes from, for error messages.
        name: by which the checkpoint calls it.

    Raises:
        CheckpointError: the template is not valid Jinja.
    """

    def __init__(self, source: str, origin: Path | str, name: str = "default") -> None:
        # Requests see the file's name, but not where it lies on this machine.
        self._name = f"{name!r} of {Path(origin).name}"
        self._environment = environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.add_filter("tojson", _tojson)
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        try:
            self._template = environment.bounded_template(source)
        except Exception as error:  # it becomes Python, whose compiler has limits of its own
            raise CheckpointError(
                f"the chat template {name!r} in {origin} is not valid: {error}; fix it or remove it"
            ) from error

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt for a conversation.

        Args:
            messages: as in OpenAI's API; entries that are ``None`` count as absent. Reasoning has
                each name that templates read it by.
            variables: what the template may use beside ``messages``.

        Raises:
            InvalidRequestError: of ``messages``, when the template refuses or fails on them; of a
                variable, when it is not a JSON value.
        """
        try:
            values = {name: _plain(value, name) for name, value in variables.items()}
            values["messages"] = [_message(message) for message in messages]
            return self._environment.render_bounded(self._template, values)
        except InvalidRequestError:
            raise
        except Exception as error:  # a template can raise whatever Python can
            raise InvalidRequestError(
                "messages",
                f"the chat template {self._name} refuses: {str(error)[:_LONGEST_REASON]}",
            ) from error


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
        return {name: ChatTemplate(_read(path), path, name) for name, path in files.items()}
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
    return {name: ChatTemplate(source, origin, name) for name, source in sources.items()}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); fetch it again") from error


def _message(message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError("messages", "each message must be an object with a role")
    plain = {n: _plain(value, "messages") for n, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


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


def _strftime_now(format: str) -> str:
    """The time of day and date, as templates of Llama 3.1 ask for it."""
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes HTML."""
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return encoder.encode(value)
    return BoundedEnvironment.concat(encoder.iterencode(value))
