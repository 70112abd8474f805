"""The profile: everything of a request, besides its tokens, that touches KV bytes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from headrace.contracts.method import Method
from headrace.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class Profile:
    """Part of the prefix tree's key: pages are shared only between equal ones, as far as methods
    leave a mark on them.

    Args:
        methods: with the request's options, in the engine's order.
        adapter: name and version of the adapter in use.
        salt: keeps the caches of tenants apart.

    Raises:
        InvalidRequestError: the adapter does not go with a method.
    """

    methods: tuple[Method, ...] = ()
    adapter: str = ""
    salt: str = ""

    def __post_init__(self) -> None:
        for method in self.methods:
            if self.adapter and not method.takes_adapters:
                raise InvalidRequestError(
                    "adapter",
                    f"{method.name()} computes with the weights of the model alone; leave it or "
                    "the adapter out",
                )

    @property
    def of_cache(self) -> Profile:
        """The profile by which pages are shared."""
        keys = [method.cache_key() for method in self.methods]
        return replace(self, methods=tuple(key for key in keys if key is not None))

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        """How many tokens of a sequence have KV that follows from them alone; ``None``: all."""
        counts = [method.shared_tokens(prompt_tokens) for method in self.methods]
        return min((count for count in counts if count is not None), default=None)

    def boundaries(self, prompt_tokens: int) -> set[int]:
        """Counts of prompt tokens at which a chunk has to end."""
        return {end for method in self.methods for end in method.boundaries(prompt_tokens)}

    @property
    def needs_all_inputs(self) -> bool:
        """Whether a method has to see every input, cached or not."""
        return any(method.needs_all_inputs for method in self.methods)


EXACT = Profile()
"""The unmodified model."""
