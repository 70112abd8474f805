"""The interactive session of ``headrace run``: a conversation, or completions one by one."""

from __future__ import annotations

import contextlib
from typing import Any

from headrace.cli.output import note
from headrace.cli.session import Session
from headrace.cli.timing import Timing
from headrace.errors import HeadraceError

FORGET = "/clear"


def converse(session: Session, *, chat: bool, system: str | None) -> None:
    """Read lines and answer them until end of input (Ctrl-D). Ctrl-C stops an answer."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and recalls earlier ones)
    kind = "conversation" if chat else "completion"
    commands = f"Ctrl-C stops an answer, Ctrl-D leaves{f', {FORGET} forgets' if chat else ''}."
    note(f"{session.llm.model_info.name}: {kind}. {commands}")
    opening = [{"role": "system", "content": system}] if system is not None else []
    messages: list[dict[str, Any]] = list(opening)
    while True:
        try:
            line = input("> ")
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("")
            continue
        if chat and line.strip() == FORGET:
            messages = list(opening)
        elif line and chat:
            messages = _turn(session, messages, line)
        elif line:
            _answer(session, line, None)


def _turn(session: Session, messages: list[dict[str, Any]], line: str) -> list[dict[str, Any]]:
    """The conversation after one more exchange; unchanged when it failed."""
    asked = [*messages, {"role": "user", "content": line}]
    text = _answer(session, line, asked)
    return messages if text is None else [*asked, {"role": "assistant", "content": text}]


def _answer(session: Session, line: str, messages: list[dict[str, Any]] | None) -> str | None:
    """Stream one answer and return its text, cut off where it was stopped; ``None`` on an error."""
    pieces: list[str] = []

    def emit(text: str) -> None:
        pieces.append(text)
        print(text, end="", flush=True)

    try:
        if messages is None:
            print(line, end="", flush=True)
            output = session.complete(line, emit)
        else:
            output = session.reply(messages, emit)
    except KeyboardInterrupt:
        print(flush=True)
    except HeadraceError as error:
        note(f"headrace: {error}")
        return None
    else:
        print(flush=True)
        note(Timing.of(output).describe())
    return "".join(pieces)
