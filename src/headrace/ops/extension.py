"""The native kernels: whether they were built, and for which instruction sets. No torch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from headrace.errors import ConfigurationError

if TYPE_CHECKING:
    from headrace.ops import _native

TORCH = "torch"
"""The value of the option ``isa`` that leaves the native kernels out."""

EMULATED = "amx_emulated"
"""AMX code with its tiles emulated, slowly: for tests on processors without AMX."""


def extension() -> ModuleType | None:
    """The module, or ``None`` if the package was built without it; a broken one raises."""
    try:
        return importlib.import_module("headrace.ops._native")
    except ModuleNotFoundError:
        return None


def supported_isas() -> tuple[str, ...]:
    """Instruction sets that have kernels and that this processor runs, the plainest first."""
    module = extension()
    return () if module is None else tuple(module.supported_isas())


def open_context(isa: str, threads: int) -> _native.Context | None:
    """The kernels of an instruction set on a thread pool of their own.

    Args:
        isa: "auto" (the best, or ``None`` if nothing was built), a name, or "torch" (``None``).

    Raises:
        ConfigurationError: the processor lacks ``isa``, nothing knows it, or it was not built.
    """
    if isa == TORCH:
        return None
    module = extension()
    if module is None:
        if isa == "auto":
            return None
        raise ConfigurationError(
            f"isa: {isa!r} needs the native kernels, but this installation was built without "
            "them; install a C++20 compiler and Headrace again, or use isa 'torch'"
        )
    try:
        context: _native.Context = module.Context(threads, isa)
    except ValueError as error:
        raise ConfigurationError(f"{error}, {TORCH}") from None
    return context
