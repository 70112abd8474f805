"""``python -m headrace`` is the program ``headrace``."""

from __future__ import annotations

from headrace.cli import main

main()
