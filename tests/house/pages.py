"""The documentation's pages, and the code in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tests.house.source import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("[a-z]*/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return [body for name, body in FENCE.findall(page.read_text("utf-8")) if name == language]


def shell_lines(page: Path) -> Iterator[str]:
    """The commands of a page's bash blocks, with continued lines joined."""
    for block in blocks(page, "bash"):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())


def headrace_commands(line: str) -> Iterator[list[str]]:
    """The arguments of each call of the program in a shell line."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set("();<>|&"):
            if words[:1] == ["headrace"]:
                yield words[1:]
            words = []
        else:
            words.append(token)


def paths(page: Path) -> set[str]:
    """Files and folders of the checkout that a page names in its commands or in backticks."""
    words = [word for line in shell_lines(page) for word in line.split()]
    words += re.findall(r"`([^`\s]+)`", FENCE.sub("", page.read_text("utf-8")))
    folders = tuple(f"{name}/" for name in ("src", "tests", "docs", "benchmarks", "zoo"))
    return {word for word in words if word.startswith(folders)}
