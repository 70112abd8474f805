"""Methods: found by name, checked at start, chosen by requests, and kept apart from each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from headrace import LLM, SamplingParams
from headrace.contracts.cache import attention_state
from headrace.contracts.method import Method, MethodCard, ModelFacts, Property, conflict
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.kv.policies.random_eviction import RandomEviction
from headrace.methods import MethodSet, find_method, known_methods, make_method
from tests.llm.conftest import MakeLLM

FACTS = ModelFacts((attention_state(1, 8, "float32"),), 128, 16, True)

OUTSIDE = '''
from dataclasses import dataclass
from typing import ClassVar

from headrace.contracts.method import Method, MethodCard


@dataclass(frozen=True, slots=True)
class Nothing(Method):
    """Does nothing.

    Args:
        loud: said so.
        times: how often.
    """

    card: ClassVar[MethodCard] = MethodCard("", "Does nothing.", "exact")
    loud: bool = False
    times: int = 1
'''


@dataclass(frozen=True, slots=True)
class Needy(Method):
    """Needs the whole past."""

    card: ClassVar[MethodCard] = MethodCard(
        "", "", "exact", requires=frozenset({Property.WHOLE_PAST}), request_options=None
    )


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **options})


def test_every_method_is_found_and_described() -> None:
    for name in known_methods():
        kind = find_method(name)
        assert kind.name() == name
        assert kind.card.summary and kind.card.guarantee in ("exact", "distribution", "lossy")
        assert not kind.preserves() & kind.breaks()


def test_names_and_options() -> None:
    assert make_method("random-eviction") == RandomEviction()
    assert make_method("random-eviction:keep=0.5,seed=3") == RandomEviction(0.5, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "method: 'nothing' is unknown; known: .*random-eviction"),
        ("random-eviction:share=1", "has no option 'share'; it has keep, seed"),
        ("random-eviction:keep=half", "keep must be of type float, got 'half'"),
        ("random-eviction:keep=0", "keep must be above 0 and at most 1, got 0.0"),
        ("random-eviction:keep=nan", "keep must be above 0 and at most 1, got nan"),
        ("/nowhere/file.py:Class", "the file /nowhere/file.py does not exist"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_method(text)


def test_a_method_from_outside_the_tree(tmp_path: Path) -> None:
    file = tmp_path / "my_method.py"
    file.write_text(OUTSIDE)
    method: Any = make_method(f"{file}:Nothing:loud=true,times=3")
    assert (method.name(), method.loud, method.times) == ("my-method", True, 3)
    for text, message in (
        (f"{file}:Something", "has no class 'Something'"),
        (f"{file}:Nothing:loud=yes", "loud must be of type bool, got 'yes'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make_method(text)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(ConfigurationError, match=r"broken.py: ZeroDivisionError"):
        make_method(f"{tmp_path / 'broken.py'}:Nothing")


def test_pairs_are_refused_with_the_reason() -> None:
    assert conflict([RandomEviction()]) is None
    assert conflict([Needy(), RandomEviction()]) == (
        "test-methods needs that the cache holds every token of the past, in every layer and "
        "head, which random-eviction breaks"
    )
    with pytest.raises(ConfigurationError, match="random-eviction is chosen twice"):
        MethodSet([RandomEviction(), RandomEviction(0.5)], FACTS)


def pair_conflict(*names: str) -> str | None:
    """What two methods say of each other, whatever their options."""
    return conflict([object.__new__(find_method(name)) for name in names])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("inference-time-intervention", "triforce"),
        ("inference-time-intervention", "scissorhands"),
        ("inference-time-intervention", "gear"),
        ("inference-time-intervention", "hogwild-inference"),
        ("inference-time-intervention", "early-exit"),
        ("inference-time-intervention", "flexgen"),
        ("core-infer", "gear"),
        ("core-infer", "hogwild-inference"),
        ("core-infer", "draft-model"),
        ("flexgen", "random-eviction"),
    ],
)
def test_pairs_that_go_together(first: str, second: str) -> None:
    assert pair_conflict(first, second) is None
    assert pair_conflict(second, first) is None


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("gear", "hogwild-inference", "stored as attention computes with them"),
        ("kivi", "gear", "stored as attention computes with them"),
        ("scissorhands", "hogwild-inference", "slots hold the tokens in their order"),
        ("random-eviction", "hogwild-inference", "the cache holds every token of the past"),
        ("gear", "draft-model", "a token that is fed belongs to its sequence"),
        ("early-exit", "triforce", "every token goes through all layers"),
        ("flexgen", "core-infer", "weights and KV pages stay where they are"),
    ],
)
def test_pairs_that_would_be_wrong(first: str, second: str, reason: str) -> None:
    for pair in ((first, second), (second, first)):
        assert reason in (pair_conflict(*pair) or "")


def test_a_model_that_lacks_what_is_needed_is_refused() -> None:
    windowed = ModelFacts((attention_state(1, 8, "float32", window=4),), 128, 16, True)
    with pytest.raises(ConfigurationError, match=r"random-eviction: needs layers .* have a window"):
        MethodSet([RandomEviction()], windowed)


def test_requests_choose() -> None:
    methods = MethodSet([Needy()], FACTS)
    assert methods.choose(None) == methods.choose({}) == (Needy(),)
    methods = MethodSet([RandomEviction()], FACTS)
    assert methods.choose(None) == (RandomEviction(),)
    assert methods.choose({}) == ()
    assert methods.choose({"random-eviction": {"keep": 1}}) == (RandomEviction(1),)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"other": {}}, "methods: 'other' is not loaded; loaded: random-eviction"),
        ({"random-eviction": {"share": 1}}, "methods.random-eviction.share: is not for requests"),
        ({"random-eviction": {"seed": 1.5}}, "seed: must be of type int, got 1.5"),
        ({"random-eviction": {"seed": True}}, "seed: must be of type int, got True"),
        ({"random-eviction": {"keep": 2.0}}, "methods.random-eviction: keep must be above 0"),
    ],
)
def test_wrong_choices(choice: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        MethodSet([RandomEviction()], FACTS).choose(choice)


def test_requests_with_and_without_a_method_share_steps(llm: LLM, make_llm: MakeLLM) -> None:
    prompt = llm.tokenizer.encode("import os\n" * 40)
    [plain] = llm.generate([prompt], params())
    lossy = make_llm(kv="random-eviction:keep=0.3")
    [alone] = lossy.generate([prompt], params(logprobs=0))
    choices = [{}, None, {}, {"random-eviction": {"keep": 1.0}}]
    mixed = lossy.generate([prompt] * 4, params(logprobs=0), methods=choices)
    tokens = [output.outputs[0].token_ids for output in mixed]
    assert tokens[0] == tokens[2] == tokens[3] == plain.outputs[0].token_ids
    logprobs = [output.outputs[0].logprobs for output in mixed]
    assert logprobs[0] == logprobs[2] == logprobs[3] != logprobs[1]
    assert logprobs[1] == alone.outputs[0].logprobs
    for wrong in ([None], [{"other": {}}] * 4):
        with pytest.raises(InvalidRequestError, match="methods"):
            lossy.generate([prompt] * 4, params(), methods=wrong)


def test_plain_requests_share_prefixes_beside_a_policy(make_llm: MakeLLM) -> None:
    llm = make_llm(kv="random-eviction:keep=0.3")
    prompt = llm.tokenizer.encode("import os\n" * 20)
    for choice, cached in ((None, False), (None, False), ({}, False), ({}, True)):
        [output] = llm.generate([prompt], params(), methods=choice)
        assert output.metrics is not None
        assert (output.metrics.num_cached_tokens > 0) == cached
