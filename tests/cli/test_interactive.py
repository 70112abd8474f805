"""``headrace run`` without a prompt, at a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.cli.run import Messages, converse
from headrace.contracts.outputs import CompletionOutput, RequestMetrics, RequestOutput
from headrace.errors import GenerationError
from tests.cli.programs import Terminal

END_OF_INPUT = "\x04"


def test_a_conversation_at_a_terminal(tmp_path: Path) -> None:
    with Terminal("run", "--max-tokens", "12", cwd=tmp_path) as terminal:
        assert "headrace-embedded: conversation." in terminal.read_until("> ")
        for _ in range(2):
            terminal.type("What is a list?\n")
            assert "output" in terminal.read_until("> ")
        terminal.type(END_OF_INPUT)
        assert terminal.wait() == 0


def test_an_interrupt_stops_the_answer(tmp_path: Path) -> None:
    options = ("--raw", "--max-tokens", "2000", "--ignore-eos")
    with Terminal("run", *options, cwd=tmp_path) as terminal:
        terminal.read_until("> ")
        terminal.type("import os\n")
        terminal.read_until("import os")  # the echo of the typing
        terminal.read_until("import os")  # the completion reads on from its prompt
        terminal.read_until("\n")
        terminal.interrupt()
        assert "first token after" not in terminal.read_until("> ")
        terminal.type(END_OF_INPUT)
        assert terminal.wait() == 0


class FakeSession:
    """Answers by a script; ``asked`` collects what it was asked."""

    def __init__(self, *answers: str | BaseException) -> None:
        self.llm: Any = type("Model", (), {"model_info": type("Info", (), {"name": "fake"})})
        self.answers = list(answers)
        self.asked: list[Any] = []

    def answer(self, prompt: str | Messages, emit: Any) -> RequestOutput:
        self.asked.append(prompt)
        answer = self.answers.pop(0)
        emit("part")
        if isinstance(answer, BaseException):
            raise answer
        emit(answer)
        metrics = RequestMetrics(0.0, 0.0, 1.0, 2.0)
        return RequestOutput("0", None, [1], [CompletionOutput(0)], True, metrics=metrics)


def talk(
    monkeypatch: pytest.MonkeyPatch,
    lines: list[str | BaseException],
    session: FakeSession,
    opening: Messages | None,
) -> None:
    """Type lines, or Ctrl-C where a KeyboardInterrupt stands, then Ctrl-D."""
    script = iter(lines)

    def read(prompt: str) -> str:
        line = next(script, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    converse(session, opening)  # type: ignore[arg-type]


def roles(messages: list[dict[str, str]]) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in messages]


def test_the_conversation_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession("A", "B", "C")
    talk(monkeypatch, ["a", "", "b", "/clear", "c"], session, [{"role": "system", "content": "s"}])
    assert [roles(messages) for messages in session.asked] == [
        ["system: s", "user: a"],
        ["system: s", "user: a", "assistant: partA", "user: b"],
        ["system: s", "user: c"],
    ]


def test_a_stopped_answer_is_kept_a_failed_one_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = FakeSession(KeyboardInterrupt(), GenerationError("broken"), "C")
    talk(monkeypatch, ["a", "b", "c"], session, [])
    assert roles(session.asked[2]) == ["user: a", "assistant: part", "user: c"]
    assert "headrace: broken" in capsys.readouterr().err


def test_an_interrupt_at_the_prompt_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession("A", "B")
    talk(monkeypatch, ["a", KeyboardInterrupt(), "b"], session, [])
    assert roles(session.asked[1]) == ["user: a", "assistant: partA", "user: b"]


def test_completions_have_no_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = FakeSession("A", "B")
    talk(monkeypatch, ["a", "/clear"], session, None)
    assert session.asked == ["a", "/clear"]
    assert capsys.readouterr().out == "apartA\n/clearpartB\n"
