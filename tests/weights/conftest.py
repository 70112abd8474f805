"""What tests of checkpoints share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.checkpoints import edit_config
from tests.support.gguf_files import convert
from tests.support.gguf_models import CONFIGS, EXPERTS, make_model


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoints of transformers by name, with the GGUF file beside them. Not to be altered."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            make_model(CONFIGS[name]()).save_pretrained(directory)
            if name.startswith("qwen3_moe"):
                # As checkpoints of others have it; transformers renames it when it saves.
                edit_config(directory, num_experts=EXPERTS["num_experts"])
            convert(directory, directory / "model.gguf")
            made[name] = directory
        return made[name]

    return find
