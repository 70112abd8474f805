"""Checkpoints of every configuration, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.models.expected import Expected
from tests.support.checkpoints import ALL_CONFIGS, CONFIGS, make_model, save_checkpoint


@pytest.fixture(scope="session")
def expectations(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Expected]:
    """What is expected of a configuration, by its name; made once."""
    made: dict[str, Expected] = {}

    def expectation(name: str) -> Expected:
        if name not in made:
            model = make_model(ALL_CONFIGS[name]())
            made[name] = Expected(model, save_checkpoint(model, tmp_path_factory.mktemp(name)))
        return made[name]

    return expectation


@pytest.fixture(params=CONFIGS)
def expected(request: pytest.FixtureRequest, expectations: Callable[[str], Expected]) -> Expected:
    """Each configuration in turn."""
    return expectations(request.param)
