"""Errors that users see. Each names what is wrong and what to do about it."""

from __future__ import annotations


class HeadraceError(Exception):
    """Base of every error that Headrace raises on purpose."""


class ConfigurationError(HeadraceError):
    """An engine option, or a combination of them, cannot work on this model or machine."""


class CheckpointError(HeadraceError):
    """A checkpoint is missing, damaged, of another shape, or of an unknown kind."""


class InvalidRequestError(HeadraceError, ValueError):
    """A request is wrong. ``field`` is the name of the offending request field."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message

    def __reduce__(self) -> tuple[type[InvalidRequestError], tuple[str, str]]:
        return type(self), (self.field, self.message)


class OverloadedError(HeadraceError):
    """The bounded queue is full. ``retry_after`` is a hint in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosedError(HeadraceError):
    """The engine was shut down, or its thread died; the cause is chained."""


class GenerationError(HeadraceError):
    """One request failed while running (for example, its logits became NaN)."""
