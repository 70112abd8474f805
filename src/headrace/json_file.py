"""JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON object from a file; empty when it is optional and absent. Raises CheckpointError."""
    content = _read(path, required, {})
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return content


def read_json_objects(path: Path) -> list[dict[str, Any]]:
    """A list of JSON objects from a file; empty when it is absent. Raises CheckpointError."""
    content = _read(path, False, [])
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise CheckpointError(f"{path} holds no list of JSON objects; fetch it again")
    return content


def _read(path: Path, required: bool, default: Any) -> Any:
    if not path.is_file():
        if required:
            raise CheckpointError(f"{path} does not exist; fetch it from where the model came from")
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
