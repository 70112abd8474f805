"""The documentation keeps to the code: links, commands, generated pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from headrace.cli.app import app
from tests.house import configuration_reference
from tests.house.pages import FENCE, PAGES, headrace_commands, paths, shell_lines
from tests.house.source import ROOT, relative


def anchors(page: Path) -> set[str]:
    """Fragments that a page's headings can be linked by, as GitHub makes them."""
    text = FENCE.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links of a page to files or headings that do not exist."""
    text = FENCE.sub("", page.read_text("utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        found = path.exists() and (not fragment or fragment in anchors(path))
        if not found:
            broken.append(target)
    return broken


def parse_command(arguments: list[str]) -> Any:
    """Parse a command line as the program would, down to the last subcommand, and run nothing."""
    command: Any = typer.main.get_command(app)
    rest = list(arguments)
    while rest and hasattr(command, "commands"):
        name = rest.pop(0)
        assert name in command.commands, f"no command {name!r}"
        command = command.commands[name]
    return command.make_context("headrace", rest)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_the_link_check_finds(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n[a](#a-title) [b](#no-title) [c](none.md) [d](https://e.org/x)\n")
    assert broken_links(page) == ["#no-title", "none.md"]


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_named_files_exist(page: Path) -> None:
    examples = {"src/headrace/models/example2.py"}
    assert [name for name in paths(page) - examples if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_parse(page: Path) -> None:
    for line in shell_lines(page):
        for arguments in headrace_commands(line):
            parse_command(arguments)


def test_the_command_check_finds() -> None:
    (arguments,) = headrace_commands('pip install . && headrace run --no-such-flag "x && y"')
    assert arguments == ["run", "--no-such-flag", "x && y"]
    with pytest.raises(Exception, match="No such option"):
        parse_command(arguments)


def test_the_readme_has_the_two_commands() -> None:
    lines = list(shell_lines(ROOT / "README.md"))
    assert 'pip install . && headrace run "def fibonacci(n):"' in lines
    assert 'pip install ".[dev]" && pytest' in lines


def test_the_configuration_page_is_what_the_code_says() -> None:
    command = "python -m tests.house.configuration_reference"
    page = configuration_reference.PAGE.read_text("utf-8")
    assert page == configuration_reference.render(), f"out of date: run {command}"
