"""The command line. ``main`` is the program ``headrace``."""

from __future__ import annotations


def main() -> None:
    """Run the program on ``sys.argv``; ends by ``SystemExit``: 0, 1 (failed) or 2 (usage)."""
    from headrace.cli.app import app

    app(prog_name="headrace")
