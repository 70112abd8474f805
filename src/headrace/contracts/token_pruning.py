"""What lets some tokens of a prompt go no further than to some layer."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from headrace.contracts.cache import MOST_GROUPS
from headrace.contracts.method import Method, ModelFacts, Property, of_kind

if TYPE_CHECKING:
    from torch import Tensor


class TokenPruningMethod(Method):
    """Drops tokens of a prompt before some layers: those behind neither compute nor cache them.

    A prompt is fed in parts of ``part_tokens``, each in one step, so that what is dropped does not
    depend on what else is in the step. Of a part, the layers from the ``k``-th of ``begins`` on
    have ``left(k, tokens)`` tokens: how many is known beforehand, so that memory is reserved and
    returned without knowing which; those are chosen where the tensors are. A part's last token goes
    through all layers, and so does all that is generated.
    """

    __slots__ = ()
    kind_requires = frozenset(
        {
            Property.TOKEN_ORDER,
            Property.WHOLE_PAST,
            Property.OWN_CONTEXT,
            Property.FULL_DEPTH,
            Property.FED_TOKENS_STAY,
            Property.IN_MEMORY,
        }
    )
    kind_breaks = frozenset({Property.WHOLE_PAST})

    @property
    @abstractmethod
    def part_tokens(self) -> int:
        """Tokens of a prompt that are fed in one step; the last part may have fewer."""

    @property
    @abstractmethod
    def window(self) -> int:
        """So many last tokens of a part are those whose attention decides."""

    @abstractmethod
    def begins(self, layers: int) -> tuple[int, ...]:
        """The layers before which tokens are dropped, ascending, the first layer being 0."""

    @abstractmethod
    def left(self, stage: int, tokens: int) -> int:
        """Of a part of so many tokens, those that the layers of a stage have.

        Stages are counted from 1; none has more than the one before, or less than 1.
        """

    @abstractmethod
    def choose(self, weights: Tensor, count: int, first: bool) -> Tensor:
        """Which tokens of a part go on to the next stage: int64 ``[count]``, ascending.

        The last one is among them.

        Args:
            weights: fp32 ``[kv_heads, heads / kv_heads, queries, tokens]``: the probabilities that
                the last tokens of the part gave to those that have come so far, in the layer before
                the stage.
            first: whether the sequence begins with this part.
        """

    def check(self, model: ModelFacts) -> None:
        """Layers on both sides of each stage's beginning, which keep all of their KV."""
        if not model.causal:
            raise ValueError("needs a model that generates; this one reads texts as a whole")
        if any(layer.window is not None for layer in model.layers):
            raise ValueError("needs layers that keep all of their KV; some here have a window")
        if any(layer.of_scope("sequence") or not layer.planes for layer in model.layers):
            raise ValueError("needs attention in every layer; some here have a recurrent state")
        last, begins = len(model.layers) - 1, self.begins(len(model.layers))
        ascending = all(one < other for one, other in pairwise(begins))
        if not ascending or not begins or begins[0] < 1 or begins[-1] > last:
            raise ValueError(
                f"layers must be ascending, from 1 to {last} for this model, "
                f"got {', '.join(map(str, begins)) or 'none'}"
            )
        if len(begins) >= MOST_GROUPS:
            raise ValueError(f"layers: name at most {MOST_GROUPS - 1}, got {len(begins)}")
        self._check_part(model)
        for tokens in range(1, self.part_tokens + 1):
            counts = [tokens, *(self.left(stage, tokens) for stage in range(1, len(begins) + 1))]
            if counts != sorted(counts, reverse=True) or counts[-1] < 1:
                raise ValueError(
                    f"of {tokens} tokens, it leaves {counts} to the stages, one by one"
                )

    def check_choice(self, loaded: Method, model: ModelFacts) -> None:
        """The cache is laid out for the stages of the one that is loaded."""
        layers = len(model.layers)
        for method in of_kind((loaded,), TokenPruningMethod):
            if self.begins(layers) != method.begins(layers):
                raise ValueError(
                    "the cache is laid out for tokens that are dropped before the layers "
                    f"{', '.join(map(str, method.begins(layers)))}; these cannot be changed"
                )
        self._check_part(model)

    def _check_part(self, model: ModelFacts) -> None:
        if self.part_tokens > model.sure_inputs:
            raise ValueError(
                f"feeds {self.part_tokens} tokens of a prompt in one step, in which a sequence is "
                f"sure of {model.sure_inputs}; shorten the span, or raise max_num_batched_tokens"
            )

    def drops(self, stages: int, prompt_tokens: int) -> bool:
        """Whether the last of so many stages has less than all of a prompt."""
        slots = StageSlots(self, self.boundaries(prompt_tokens))
        return slots.after(stages - 1, prompt_tokens) < prompt_tokens

    def shared_tokens(self, prompt_tokens: int) -> int | None:
        """Nothing is shared: a prefix does not decide which of its tokens a layer has."""
        return 0

    def boundaries(self, prompt_tokens: int) -> tuple[int, ...]:
        """Those of the parts."""
        return (*range(self.part_tokens, prompt_tokens, self.part_tokens), prompt_tokens)


class StageSlots:
    """How many slots a sequence has in the layers of each stage: a function of the tokens fed.

    Args:
        ends: of the parts of its prompt, ascending; the last is the prompt's.
    """

    __slots__ = ("_ends", "_method", "_sums")

    def __init__(self, method: TokenPruningMethod, ends: Sequence[int]) -> None:
        self._method, self._ends = method, (0, *ends)
        self._sums: dict[int, list[int]] = {}

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self._ends[-1]

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Beginning and end of each part."""
        return list(pairwise(self._ends))

    def after(self, stage: int, fed: int) -> int:
        """Slots when ``fed`` tokens have been fed: up to the end of a part, or behind all."""
        sums = self._sums.get(stage)
        if sums is None:
            sums = self._sums[stage] = [0]
            for start, end in self.parts:
                left = self._method.left(stage, end - start) if stage else end - start
                sums.append(sums[-1] + left)
        part = bisect_right(self._ends, fed) - 1
        return sums[part] + fed - self._ends[part]
