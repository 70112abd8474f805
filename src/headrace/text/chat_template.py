"""Chat templates: Jinja programs that come with a checkpoint, run in a sandbox.

A template is untrusted. The sandbox keeps it from Python's internals, loops and calls stop at a
deadline, and it sees plain JSON values only. What a single C-level operation allocates is limited
for repetition and powers alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from headrace.errors import CheckpointError, InvalidRequestError

_SECONDS = 10.0
_LONGEST_REPETITION = 1 << 20
_LARGEST_POWER_BITS = 1 << 10
_DEADLINE = "deadline of this rendering"  # no identifier, so that no template can set it


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja text.
        origin: the file it comes from, for error messages.
        seconds: how long one rendering may take.

    Raises:
        CheckpointError: the template is not valid Jinja.
    """

    def __init__(self, source: str, origin: Path, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        try:
            self._template = _compile(source)
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
            conversation = [_message(message) for message in messages]
            values = {name: _plain(value, name) for name, value in variables.items()}
            values[_DEADLINE] = time.monotonic() + self._seconds
            return self._template.render(values | {"messages": conversation})
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
    named = _named_sources(configured, origin)
    return {name: ChatTemplate(source, origin) for name, source in named.items()}


def _named_sources(configured: Any, origin: Path) -> dict[str, str]:
    if isinstance(configured, str):
        return {"default": configured}
    try:
        sources = {entry["name"]: entry["template"] for entry in configured}
        if all(isinstance(text, str) for pair in sources.items() for text in pair):
            return sources
    except (TypeError, KeyError):
        pass
    raise CheckpointError(
        f"chat_template in {origin} must be a string or a list of objects with a name and a "
        "template; download the file again"
    )


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file of a checkpoint.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        value = json.loads(_read(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object; download it again")
    return value


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again") from error


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


def _compile(source: str) -> jinja2.Template:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters |= {"tojson": _tojson, "metered": jinja2.pass_context(_metered)}
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    del environment.globals["lipsum"]
    tree = environment.parse(source)
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, "metered", [], [], None, None, lineno=loop.lineno)
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        _check_deadline(__context)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "**":
            bits = int(left).bit_length() * abs(right) if numbers else 0
            too_much = bits > _LARGEST_POWER_BITS
        else:
            too_much = not numbers and _repeated_length(left, right) > _LONGEST_REPETITION
        if too_much:
            raise SecurityError(f"a result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _repeated_length(left: Any, right: Any) -> int:
    sequence, count = (right, left) if isinstance(left, int) else (left, right)
    return len(sequence) * count if isinstance(count, int) else 0


def _check_deadline(context: Context) -> None:
    if time.monotonic() > context.parent[_DEADLINE]:
        raise SecurityError("it takes too long")


def _metered(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_deadline(context)
        yield item


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's part for training; here it only renders it."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
