"""Tasks: their problems can be solved, and training and tests never share one."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.evaluation.split import TEST_SHARE, split_of
from headrace.evaluation.suite import SUITE_NAMES, make_suite, make_task
from headrace.evaluation.task import TASKS, final_answer
from headrace.evaluation.tasks.countdown import evaluate
from headrace.evaluation.tasks.recall import FILLER, KEYS, VALUES, Recall
from headrace.loading import embedded_model
from headrace.text.tokenizer import Tokenizer

LEVELS = [(name, level) for name in TASKS for level in make_task(name).levels]
GENERATED = [(name, level) for name, level in LEVELS if name != "code-completion"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(embedded_model())


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_its_own_solution_is_right(name: str, level: str, tokenizer: Tokenizer) -> None:
    task = make_task(name)
    for problem in islice(task.problems("test", level, seed=3), 30):
        assert task.score(problem, problem.solution) == 1
        assert task.score(problem, "") == 0
        assert task.score(problem, "Answer: none of these") == 0
        assert len(tokenizer.encode(problem.solution)) < task.max_tokens(level)


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_the_seed_decides(name: str, level: str) -> None:
    task = make_task(name)
    first, again, other = (
        list(islice(task.problems("test", level, seed), 5)) for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(("name", "level"), GENERATED)
@pytest.mark.parametrize("seed", [0, 17])
def test_training_and_tests_share_no_problem(name: str, level: str, seed: int) -> None:
    task = make_task(name)
    splits = {
        split: {p.identity for p in islice(task.problems(split, level, seed), 60)}  # type: ignore[arg-type]
        for split in ("train", "test")
    }
    assert not splits["train"] & splits["test"]
    for split, identities in splits.items():
        assert {split_of(identity) for identity in identities} == {split}


def test_the_share_of_tests() -> None:
    found = sum(split_of(f"problem {i}") == "test" for i in range(8000))
    assert abs(found / 8000 - TEST_SHARE) < 0.02


def test_code_is_only_tested_on() -> None:
    with pytest.raises(ValueError, match="test split only"):
        next(make_task("code-completion").problems("train", "line", 0))


def test_an_unknown_level() -> None:
    with pytest.raises(ValueError, match="'7' is none of 2, 4, 6"):
        next(make_task("arithmetic").problems("test", "7", 0))


@pytest.mark.parametrize("name", ["needle", "multi-key", "multi-value", "variable-tracking"])
@pytest.mark.parametrize("level", ["256", "4096"])
def test_contexts_are_as_long_as_they_say(name: str, level: str, tokenizer: Tokenizer) -> None:
    task = make_task(name)
    for problem in islice(task.problems("test", level, seed=0), 5):
        assert 0 <= int(level) - len(tokenizer.encode(problem.identity)) <= 2


def test_words_have_one_meaning(tokenizer: Tokenizer) -> None:
    words = (*KEYS, *VALUES, *FILLER)
    assert len(set(words)) == len(words)
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in words)


@given(st.randoms(use_true_random=False), st.integers(8, 600))
def test_every_answer_can_be_read_off(source: random.Random, length: int) -> None:
    for name in ("needle", "multi-key", "multi-value", "variable-tracking"):
        task = make_task(name)
        assert isinstance(task, Recall)
        passage = task.passage(source, length)
        facts: dict[str, str] = {}
        for sentence in passage.context.split("."):
            subject, found, rest = sentence.partition(" is ")
            if found and subject.strip() in KEYS:
                key = subject.strip()
                meant = facts.get(rest, rest)
                facts[key] = f"{facts[key]}, {meant}" if key in facts else meant
        assert passage.answers
        assert all(facts[key] == answer for key, answer in passage.answers.items())


def test_some_of_the_values_are_worth_some_of_the_score() -> None:
    task = make_task("multi-value")
    problem = next(task.problems("test", "1024", 0))
    first, *_ = problem.answer.split(", ")
    assert task.score(problem, f" {first}.") == pytest.approx(1 / 3)
    assert task.score(problem, f" {problem.answer}, nonsense.") == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("expression", "value", "used"),
    [
        ("(3+4)*2", 14, [3, 4, 2]),
        ("7", 7, [7]),
        ("10-2-3", 5, [10, 2, 3]),
        ("2**9", None, []),
        ("9/3", None, []),
        ("-3", None, []),
        ("__import__('os')", None, []),
        ("3+", None, []),
        ("1.5+2", None, []),
        ("True+1", None, []),
        ("(" * 150, None, []),
        ("9" * 300, None, []),
    ],
)
def test_expressions(expression: str, value: int | None, used: list[int]) -> None:
    assert evaluate(expression) == (value, used)


def test_other_ways_to_a_target_count_and_cheating_does_not() -> None:
    task = make_task("countdown")
    problem = next(
        p for p in task.problems("test", "3", 0) if len(set(p.question.split()[3:])) == 3
    )
    target, _, numbers = problem.answer.removeprefix("Make ").rstrip(".").partition(" from ")
    assert task.score(problem, problem.solution) == 1
    assert task.score(problem, f"Answer: {target}") == float(target in numbers.split(", "))
    doubled = "+".join(numbers.split(", ") * 2)
    assert task.score(problem, f"Answer: {doubled}") == 0


def test_the_last_answer_counts() -> None:
    assert final_answer("Answer: 3\nno\nAnswer: 4 \nrest") == "4"
    assert final_answer("3") == ""


@pytest.mark.parametrize("name", SUITE_NAMES)
def test_suites_name_every_plan_once(name: str) -> None:
    names = [plan.name for plan in make_suite(name).plans]
    assert len(set(names)) == len(names)
    assert {plan.task.name for plan in make_suite(name).plans} == set(TASKS)
