"""``headrace run``: complete a prompt, or talk."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.options import ENGINE, SAMPLING, Json, takes
from headrace.cli.output import load, note, report
from headrace.cli.timing import describe, timing
from headrace.contracts.outputs import RequestOutput
from headrace.errors import HeadraceError, InvalidRequestError

if TYPE_CHECKING:
    from headrace.llm import AsyncLLM

FORGET = "/clear"
MAX_TOKENS = 256
"""Length of an answer when none is asked for; less where the context ends."""

Prompt = typer.Argument(help="Text to continue; read from stdin when piped.", show_default=False)
Chat = typer.Option(
    "--chat/--raw",
    help="Apply the chat template, or do not (default: only in a conversation).",
    show_default=False,
)
System = typer.Option("--system", help="System message of a chat.", show_default=False)

Messages = list[dict[str, Any]]
Emit = Callable[[str], None]


@takes(engine=ENGINE, sampling=SAMPLING)
def run(
    engine: dict[str, Any],
    sampling: dict[str, Any],
    prompt: Annotated[str | None, Prompt] = None,
    chat: Annotated[bool | None, Chat] = None,
    system: Annotated[str | None, System] = None,
    as_json: Json = False,
) -> None:
    """Continue PROMPT (or stdin); without either, talk to the model.

    The text streams to stdout, its speed goes to stderr. Example: headrace run "def fibonacci(n):"
    """
    if system is not None and chat is False:
        raise typer.BadParameter("--system needs a chat")
    if prompt is None and not sys.stdin.isatty():
        prompt = _read_stdin()
    if prompt == "":
        raise InvalidRequestError("prompt", "is empty; give PROMPT or pipe text in")
    if prompt is None and as_json:
        raise typer.BadParameter("--json needs a prompt")

    from headrace.llm import AsyncLLM

    opening = [] if system is None else [_message("system", system)]
    with contextlib.closing(load(AsyncLLM, engine)) as llm, asyncio.Runner() as runner:
        session = Session(llm, runner, sampling)
        if prompt is None:
            talks = llm.tokenizer.has_chat_template if chat is None else chat
            converse(session, opening if talks else None)
        else:
            messages = [*opening, _message("user", prompt)] if chat or opening else None
            complete(session, prompt, messages, as_json)


@dataclass(frozen=True, slots=True)
class Session:
    """Runs requests of a loaded model to their end.

    ``sampling`` holds fields of SamplingParams; the model's own defaults fill the rest.
    """

    llm: AsyncLLM
    runner: asyncio.Runner
    sampling: dict[str, Any]

    def answer(self, prompt: str | Messages, emit: Emit) -> RequestOutput:
        """Continue a text or answer a conversation, handing each new piece of text to ``emit``.

        Raises:
            KeyboardInterrupt: Ctrl-C; the request is aborted and the session stays usable.
            HeadraceError: the request is wrong or failed.
        """
        tokenizer = self.llm.tokenizer
        encode: Any = tokenizer.encode if isinstance(prompt, str) else tokenizer.encode_chat
        token_ids = encode(prompt)
        room = self.llm.model_info.max_model_len - len(token_ids)
        length = {"max_tokens": max(1, min(MAX_TOKENS, room))}
        params = self.llm.default_sampling_params(**{**length, **self.sampling})

        async def stream() -> RequestOutput:
            sent = 0
            async with contextlib.aclosing(self.llm.generate(token_ids, params)) as outputs:
                async for output in outputs:
                    text = output.outputs[0].text
                    emit(text[sent:])
                    sent = len(text)
            return output

        return self.runner.run(stream())


def complete(session: Session, prompt: str, messages: Messages | None, as_json: bool) -> None:
    """Print the answer to one prompt. On a terminal a completion reads on from its prompt."""
    emit: Emit = (lambda text: None) if as_json else _write
    if messages is None and sys.stdout.isatty():
        emit(prompt)
    output = session.answer(prompt if messages is None else messages, emit)
    if as_json:
        result = {
            "model": session.llm.model_info.name,
            "prompt": prompt,
            "prompt_token_ids": output.prompt_token_ids,
            **asdict(output.outputs[0]),
            "timing": timing(output),
        }
        report(result, as_json=True)
    else:
        print(flush=True)
        note(describe(timing(output)))


def converse(session: Session, opening: Messages | None) -> None:
    """Read lines and answer them until end of input (Ctrl-D). Ctrl-C stops an answer.

    Args:
        opening: how the conversation begins; ``None`` completes each line by itself.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and recalls earlier ones)
    kind, more = ("completion", "") if opening is None else ("conversation", f", {FORGET} forgets")
    note(f"{session.llm.model_info.name}: {kind}. Ctrl-C stops an answer, Ctrl-D leaves{more}.")
    messages = list(opening or ())
    while True:
        try:
            line = input("> ")
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("")
            continue
        if not line:
            continue
        if opening is None:
            _write(line)
            _reply(session, line)
        elif line.strip() == FORGET:
            messages = list(opening)
        else:
            asked = [*messages, _message("user", line)]
            text = _reply(session, asked)
            if text is not None:
                messages = [*asked, _message("assistant", text)]


def _reply(session: Session, prompt: str | Messages) -> str | None:
    """Stream one answer and return its text, cut off where it was stopped; ``None`` on an error."""
    pieces: list[str] = []

    def emit(text: str) -> None:
        pieces.append(text)
        _write(text)

    try:
        output = session.answer(prompt, emit)
    except KeyboardInterrupt:
        print(flush=True)
    except HeadraceError as error:
        note(f"headrace: {error}")
        return None
    else:
        print(flush=True)
        note(describe(timing(output)))
    return "".join(pieces)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError("prompt", f"stdin is not valid UTF-8: {error}") from None
