"""Headrace: an LLM inference engine whose methods are measured, composable parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headrace.contracts.outputs import CompletionOutput, RequestOutput
from headrace.contracts.sampling import SamplingParams

if TYPE_CHECKING:
    from headrace.llm import LLM, AsyncLLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the engine, and torch with it, only when it is used."""
    if name in ("LLM", "AsyncLLM"):
        from headrace import llm

        return getattr(llm, name)
    raise AttributeError(f"module 'headrace' has no attribute {name!r}")
