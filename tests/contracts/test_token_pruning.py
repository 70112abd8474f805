"""How many slots each stage has, and what a model must have for stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest

from headrace.contracts.cache import LayerState, PlaneSpec, attention_state
from headrace.contracts.method import MethodCard, ModelFacts
from headrace.contracts.profile import Profile
from headrace.contracts.token_pruning import StageSlots
from headrace.errors import InvalidRequestError
from headrace.methods import MethodSet
from tests.engine.hashed_tokens import HashedTokens

ATTENTION = attention_state(1, 8, "float32")
STATE = LayerState((PlaneSpec("state", "sequence", 2, 8, "float32"),))
METHOD = HashedTokens(part=8, share=0.5)


def test_slots_follow_from_the_parts_of_the_prompt() -> None:
    ends = METHOD.boundaries(21)
    assert ends == (8, 16, 21)
    slots = StageSlots(METHOD, ends)
    assert [slots.after(0, fed) for fed in (0, 8, 16, 21, 22, 40)] == [0, 8, 16, 21, 22, 40]
    assert [slots.after(1, fed) for fed in (0, 8, 16, 21, 22, 40)] == [0, 4, 8, 11, 12, 30]
    assert [slots.after(2, fed) for fed in (0, 8, 16, 21, 22, 40)] == [0, 2, 4, 6, 7, 25]
    assert slots.parts == [(0, 8), (8, 16), (16, 21)]


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 16])
def test_the_last_part_ends_with_the_prompt(prompt: int) -> None:
    ends = METHOD.boundaries(prompt)
    assert ends[-1] == prompt and list(ends) == sorted(set(ends))
    assert Profile(methods=(METHOD,)).shared_tokens(prompt) == 0


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([ATTENTION, STATE], {}, "some here have a recurrent state"),
        ([ATTENTION, attention_state(1, 8, "float32", 4)], {}, "some here have a window"),
        ([ATTENTION], {}, "from 1 to 0 for this model, got none"),
        ([ATTENTION] * 9, {}, "name at most 7, got 8"),
        ([ATTENTION] * 3, {"causal": False}, "needs a model that generates"),
        ([ATTENTION] * 3, {"sure_inputs": 7}, "feeds 8 tokens of a prompt in one step"),
    ],
)
def test_models_that_do_not_fit(
    layers: list[LayerState], options: dict[str, int], message: str
) -> None:
    facts = ModelFacts(tuple(layers), 128, 16, **{"causal": True, **options})
    with pytest.raises(ValueError, match=message):
        METHOD.check(facts)


@pytest.mark.parametrize("wrong", [lambda tokens: tokens + 1, lambda tokens: 0])
def test_no_stage_has_more_than_the_one_before_or_nothing(wrong: Callable[[int], int]) -> None:
    @dataclass(frozen=True, slots=True)
    class Wrong(HashedTokens):
        def left(self, stage: int, tokens: int) -> int:
            return wrong(tokens) if (stage, tokens) == (2, 5) else 1

    with pytest.raises(ValueError, match=r"of 5 tokens, it leaves \[5, 1, [06]\] to the stages"):
        Wrong(part=8).check(ModelFacts((ATTENTION,) * 3, 128, 16, True))


@dataclass(frozen=True, slots=True)
class Later(HashedTokens):
    """Stages from one layer on, that requests may ask for."""

    card: ClassVar[MethodCard] = MethodCard("", "", "lossy", request_options=("first", "part"))
    first: int = 1

    def begins(self, layers: int) -> tuple[int, ...]:
        return tuple(range(self.first, layers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"first": 2},
            "first: the cache is laid out for tokens that are dropped before the layers",
        ),
        ({"part": 9}, "part: feeds 9 tokens of a prompt in one step"),
    ],
)
def test_requests_cannot_change_what_the_engine_was_laid_out_for(
    options: dict[str, int], message: str
) -> None:
    facts = ModelFacts((ATTENTION,) * 3, 128, 16, True, sure_inputs=8)
    methods = MethodSet([Later(part=8)], facts)
    assert methods.choose({Later.name(): {"first": 1, "part": 4}}) == (Later(part=4),)
    with pytest.raises(InvalidRequestError, match=message):
        methods.choose({Later.name(): options})


def test_a_prompt_of_which_nothing_is_dropped() -> None:
    assert not METHOD.drops(1, 21)
    assert [METHOD.drops(2, prompt) for prompt in (1, 2, 3)] == [False, True, True]
    assert not HashedTokens(part=8, share=1.0).drops(3, 21)


def test_a_model_that_fits() -> None:
    METHOD.check(ModelFacts((ATTENTION,) * 3, 128, 16, True, sure_inputs=8))
