"""Errors cross processes and name what is wrong."""

from __future__ import annotations

import pickle

import pytest

from headrace import errors
from headrace.errors import (
    CheckpointError,
    ConfigurationError,
    EngineClosedError,
    GenerationError,
    HeadraceError,
    InvalidRequestError,
    OverloadedError,
)

EXAMPLES = [
    HeadraceError("something"),
    ConfigurationError("dtype: unknown"),
    CheckpointError("no weights"),
    InvalidRequestError("top_p", "must be above 0"),
    OverloadedError("full", retry_after=2.5),
    EngineClosedError("closed"),
    GenerationError("NaN"),
]


def test_every_error_is_tried() -> None:
    named = {v for v in vars(errors).values() if isinstance(v, type)}
    assert named == {type(example) for example in EXAMPLES}
    assert all(issubclass(kind, HeadraceError) for kind in named)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_are_pickled_whole(error: HeadraceError, protocol: int) -> None:
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_a_bad_request_is_a_value_error() -> None:
    error = InvalidRequestError("stop", "is empty")
    assert isinstance(error, ValueError)
    assert (str(error), error.field, error.message) == ("stop: is empty", "stop", "is empty")
