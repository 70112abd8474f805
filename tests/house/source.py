"""What the house rules read: the Python files of the checkout and their syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "headrace"


def python_files() -> list[Path]:
    """Every Python file of the checkout, without hidden folders, environments and builds."""
    files = sorted(ROOT.glob("*.py"))
    for folder in sorted(ROOT.iterdir()):
        skipped = folder.name.startswith(".") or folder.name in ("build", "dist")
        if folder.is_dir() and not skipped and not (folder / "pyvenv.cfg").exists():
            files += sorted(folder.rglob("*.py"))
    return files


def relative(path: Path) -> str:
    """The path as it is written in messages."""
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def room(path: Path) -> str:
    """The room of a file of the package: its folder, or its own name at the top ("config")."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def docstrings(tree: ast.AST) -> set[int]:
    """Identities of the constants that stand as statements: documentation, not values."""
    statements = (node for node in ast.walk(tree) if isinstance(node, ast.Expr))
    return {id(node.value) for node in statements if isinstance(node.value, ast.Constant)}


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, at the top and inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module
