"""The held-out text: modules of Python's library that no model of the family is trained on."""

from __future__ import annotations

import sysconfig
from pathlib import Path

HELD_OUT_MODULES = (
    *("bisect", "calendar", "cmd", "colorsys", "csv", "fnmatch", "fractions", "graphlib"),
    *("heapq", "json", "netrc", "plistlib", "queue", "sched", "secrets", "shelve", "shlex"),
    *("statistics", "textwrap", "tomllib", "wsgiref", "zipapp"),
)
"""Whole modules and packages, of different kinds."""


def library_root() -> Path:
    """Directory of the running interpreter's library."""
    return Path(sysconfig.get_paths()["stdlib"])


def held_out_texts() -> dict[str, str]:
    """Path below the library's root -> text, in the order of the paths."""
    root = library_root()
    found: dict[str, str] = {}
    for module in HELD_OUT_MODULES:
        single = root / f"{module}.py"
        files = [single] if single.exists() else sorted((root / module).rglob("*.py"))
        for file in files:
            text = file.read_text("utf-8")
            if text.strip():
                found[file.relative_to(root).as_posix()] = text
    return found
