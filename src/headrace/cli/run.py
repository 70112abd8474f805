"""``headrace run``: complete a prompt, or talk."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from headrace.cli.interactive import converse
from headrace.cli.options import ENGINE, SAMPLING, takes
from headrace.cli.output import loading, note, print_json
from headrace.cli.session import Session
from headrace.cli.timing import Timing
from headrace.errors import InvalidRequestError


@takes(engine=ENGINE, sampling=SAMPLING)
def run(
    engine: dict[str, Any],
    sampling: dict[str, Any],
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to continue; read from stdin when piped.", show_default=False),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            " /--no-chat",
            help="Apply the chat template, or do not (default: only in a conversation).",
            show_default=False,
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="System message of a chat.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end.")
    ] = False,
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

    with loading() as progress:
        llm = AsyncLLM(**engine, progress=progress)
    with Session(llm, sampling) as session:
        if prompt is None:
            converse(
                session, chat=session.has_chat_template if chat is None else chat, system=system
            )
        else:
            _answer(
                session,
                prompt,
                chat=bool(chat) or system is not None,
                system=system,
                as_json=as_json,
            )


def _answer(
    session: Session, prompt: str, *, chat: bool, system: str | None, as_json: bool
) -> None:
    """Print the answer to one prompt. On a terminal a completion reads on from its prompt."""

    def emit(text: str) -> None:
        if not as_json:
            print(text, end="", flush=True)

    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        output = session.reply([*messages, {"role": "user", "content": prompt}], emit)
    else:
        if sys.stdout.isatty():
            emit(prompt)
        output = session.complete(prompt, emit)
    timing = Timing.of(output)
    if not as_json:
        print(flush=True)
        note(timing.describe())
        return
    completion = output.outputs[0]
    print_json(
        {
            "model": session.llm.model_info.name,
            "prompt": prompt,
            "prompt_token_ids": output.prompt_token_ids,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "timing": timing.as_dict(),
        }
    )


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError("prompt", f"stdin is not valid UTF-8: {error}") from None
