"""Runs the command line: in this process, or as a program of its own."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner, Result

from headrace.cli.app import app


def invoke(*arguments: str, stdin: str | bytes | None = None) -> Result:
    """Run a command in this process, with its output caught."""
    return CliRunner().invoke(app, list(arguments), input=stdin)


def start(
    *arguments: str, cwd: Path, stdin: int | None = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    """Start the installed program, with pipes for its output."""
    return subprocess.Popen(
        [sys.executable, "-m", "headrace", *arguments],
        cwd=cwd,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Terminal:
    """The program at a terminal of its own. ``screen`` is all that it has shown."""

    PATIENCE = 60.0

    def __init__(self, *arguments: str, cwd: Path) -> None:
        self._side, other = pty.openpty()
        self.program = subprocess.Popen(
            [sys.executable, "-m", "headrace", *arguments],
            cwd=cwd,
            stdin=other,
            stdout=other,
            stderr=other,
        )
        os.close(other)
        self.screen = ""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self._side)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._side, text.encode())

    def interrupt(self) -> None:
        """What Ctrl-C does."""
        self.program.send_signal(signal.SIGINT)

    def read_until(self, text: str) -> str:
        """Wait for ``text`` to appear after what was read before; return all up to its end."""
        while text not in self.screen[self._seen :]:
            ready, _, _ = select.select([self._side], [], [], self.PATIENCE)
            assert ready, f"{text!r} does not appear in {self.screen!r}"
            try:
                self.screen += os.read(self._side, 65536).decode()
            except OSError:  # the program has ended and closed its side
                raise AssertionError(f"{text!r} is not in {self.screen!r}") from None
        start, self._seen = self._seen, self.screen.index(text, self._seen) + len(text)
        return self.screen[start : self._seen]

    def wait(self) -> int:
        """The exit status, after the program has ended by itself."""
        return self.program.wait(self.PATIENCE)
