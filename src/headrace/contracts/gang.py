"""Gangs: the sequences of one request that see each other's tokens as they come."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from headrace.contracts.method import Method, ModelFacts, Property, of_kind


class GangMethod(Method):
    """Says how the sequences of a request with several of them, a gang, see each other.

    The prompt is computed once. Behind it each sequence has a block of its own, which begins with
    its header and goes on with what is generated, and whose keys are cached once. All sequences
    feed one token of their blocks in each step. Rule: token t of a block is computed from the
    prompt, from the first t tokens of the blocks that it sees, or from all of one that has fewer,
    and from its own block up to itself. So what is computed follows from the tokens, and is the
    same when a gang that was preempted is computed again. The last token of a sequence that has
    ended is fed to nobody.

    A request with one sequence is computed as without the method.
    """

    __slots__ = ()
    kind_requires = frozenset(
        {
            Property.PLAIN_ENTRIES,
            Property.TOKEN_ORDER,
            Property.WHOLE_PAST,
            Property.OWN_CONTEXT,
            Property.FULL_DEPTH,
            Property.FED_TOKENS_STAY,
            Property.IN_MEMORY,
        }
    )
    kind_breaks = frozenset({Property.OWN_CONTEXT})

    def check(self, model: ModelFacts) -> None:
        """It needs layers that keep keys and values of all tokens, and rotary positions."""
        if any(layer.of_scope("sequence") or not layer.planes for layer in model.layers):
            raise ValueError("needs attention in every layer; some here have a recurrent state")
        if any(layer.window is not None for layer in model.layers):
            raise ValueError("needs layers that see all of their past; some here have a window")
        if not model.rotary:
            raise ValueError(
                "needs positions that attention itself turns queries and keys by (RoPE), so that "
                "keys can be seen at several; this model has other ones, or turns a latent"
            )

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        """The prompt: blocks depend on each other."""
        return prompt_tokens

    @abstractmethod
    def seen_blocks(self, viewer: int, count: int) -> Sequence[int]:
        """Whose blocks sequence ``viewer`` of ``count`` sees between prompt and its own, in order.

        Each at most once, and not its own.
        """

    def headers(self, count: int) -> Sequence[str]:
        """The text with which each sequence's block begins; empty: with what is generated."""
        return [""] * count


def gang_method(methods: Sequence[Method], count: int) -> GangMethod | None:
    """What makes a gang of the ``count`` sequences of a request with these methods, if anything."""
    found = of_kind(methods, GangMethod)
    return found[0] if found and count > 1 else None
