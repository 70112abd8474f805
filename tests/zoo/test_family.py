"""The recipes of the family: what their batches teach, and what they write."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from headrace import LLM, SamplingParams
from headrace.evaluation.split import split_of
from headrace.evaluation.suite import make_task
from headrace.evaluation.tasks.arithmetic import Arithmetic
from headrace.evaluation.tasks.recall import MultiKey, Needle, Recall
from zoo import base, draft, long, reason, verifier
from zoo import recipe as recipes
from zoo.combined import InTurn, SideBySide
from zoo.data import Phase
from zoo.generated import (
    ConversationRows,
    GeneratedData,
    RecallRows,
    Share,
    conversation_documents,
    recall_documents,
)
from zoo.model import IGNORED, LanguageModel, ModelConfig, initialize
from zoo.recipe import Recipe, run
from zoo.round_weights import round_checkpoint, round_weight
from zoo.selection import majority
from zoo.tokenizer import load_tokenizer
from zoo.train import TrainConfig, learning_rate_scale
from zoo.verifier import Attempt, JudgementRows

LIMIT = 40 << 20
"""Bytes of tracked files of weights."""
SMALL = ModelConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    intermediate_size=64,
    max_position_embeddings=512,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(recipes.TOKENIZER / "tokenizer.json")


def learnt(tokenizer: Tokenizer, targets: list[int]) -> str:
    """The text of the targets that count."""
    kept = [target for target in targets if target != IGNORED]
    text: str = tokenizer.decode(kept, skip_special_tokens=False)
    return text


def test_conversations_teach_their_answers(tokenizer: Tokenizer) -> None:
    rows = ConversationRows(tokenizer, [Share(Arithmetic(), "2", 1)])
    [(tokens, targets)] = rows.rows(random.Random(0), 200, 1)
    assert len(tokens) == len(targets) == 200
    for place, target in enumerate(targets[:-1]):
        assert target in (IGNORED, tokens[place + 1])
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    answers = [part.split("<|end|>")[0] for part in text.split("<|assistant|>\n")[1:]]
    assert learnt(tokenizer, targets) == "".join(f"{answer}<|end|>\n" for answer in answers)


def test_recall_teaches_answers_only(tokenizer: Tokenizer) -> None:
    rows = RecallRows(tokenizer, [MultiKey()])
    source = random.Random(1)
    for length, dense in ((64, True), (4096, False)):
        for tokens, targets in rows.rows(source, length, 5):
            assert len(tokens) == len(targets) == length
            assert ("\n?" not in tokenizer.decode(tokens)) == dense
    for tokens, targets in rows.rows(source, 1024, 5):
        if "\n?" not in tokenizer.decode(tokens):
            continue
        context, *questions = tokenizer.decode(tokens).split("\n?")
        answers = "".join(q.split(" is")[1].split("<")[0] for q in questions)
        assert learnt(tokenizer, targets) == answers.rstrip()
        facts = dict(part.strip().split(" is ") for part in context.split(".") if " is " in part)
        for question in questions:
            key, answer = question.split("<")[0].strip().rstrip(".").split(" is ")
            assert facts[key] == answer


def test_repetitions_teach_what_was_said(tokenizer: Tokenizer) -> None:
    rows = RecallRows(tokenizer, [MultiKey()])
    for tokens, targets in rows.rows(random.Random(2), 64, 5):
        known: dict[str, str] = {}
        expected = []
        for statement in tokenizer.decode(tokens).strip(".").split("."):
            key, value = statement.strip().split(" is ")
            if key in known:
                assert known[key] == value
                expected.append(value)
            known[key] = value
        assert learnt(tokenizer, targets).split() == expected
        for place, target in enumerate(targets):
            assert target in (IGNORED, tokens[place + 1] if place + 1 < len(tokens) else IGNORED)


def test_nothing_of_the_tests_is_taught(tokenizer: Tokenizer) -> None:
    task = make_task("arithmetic")
    text = " ".join(conversation_documents([Share(task, "2", 1)], 200, seed=0))
    questions = [part.split("<|end|>")[0] for part in text.split("<|user|>\n")[1:]]
    assert len(questions) == 200
    assert {split_of(question) for question in questions} == {"train"}
    needle = make_task("needle")
    assert isinstance(needle, Recall)
    for document in recall_documents([needle], 256, 40, seed=0):
        context, *asked = document.split("\n?")
        for question in asked:
            assert split_of(f"{context}\n?{question.split(' is')[0]} is") == "train"


def test_batches_are_a_function_of_the_step(tokenizer: Tokenizer) -> None:
    def make(seed: int) -> GeneratedData:
        phases = (Phase(0.5, 64), Phase(0.5, 128))
        return GeneratedData(RecallRows(tokenizer, [Needle()]), phases, 2560, 256, seed)

    data, again, other = make(0), make(0), make(1)
    assert data.steps == 10
    assert [data.batch(step)[0].shape for step in (0, 4, 5, 9)] == [
        *((4, 64), (4, 64), (2, 128), (2, 128))
    ]
    for step in (3, 7, 3):
        for one, two in zip(data.batch(step), again.batch(step), strict=True):
            assert np.array_equal(one, two)
    assert data.digest() == again.digest() != other.digest()
    with pytest.raises(IndexError, match="step 10 is not one of 10"):
        data.batch(10)


def test_ignored_targets_do_not_count() -> None:
    torch.manual_seed(0)
    model = LanguageModel(replace(SMALL, vocab_size=100))
    initialize(model, 0, embedding_deviation=0.5)
    tokens = torch.randint(0, 100, (2, 20))
    targets = torch.randint(0, 100, (2, 20))
    whole = model.loss(tokens, targets)
    counted = targets.clone()
    counted[:, :12] = IGNORED
    logits = model(tokens)[:, 12:].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets[:, 12:].flatten())
    assert model.loss(tokens, counted).item() == pytest.approx(expected.item(), rel=1e-5)
    assert whole.item() != pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("deviation", [0.02, 0.5])
def test_first_logits_are_moderate(deviation: float) -> None:
    model = LanguageModel(ModelConfig())
    initialize(model, 0, deviation)
    logits = model(torch.arange(64)[None])
    assert logits.std().item() < 2
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(deviation, rel=0.02)


def test_data_after_and_beside_each_other(tokenizer: Tokenizer) -> None:
    phases = (Phase(1.0, 64),)

    def data(steps: int, rows: int, seed: int) -> GeneratedData:
        maker = ConversationRows(tokenizer, [Share(Arithmetic(), "2", 1)])
        return GeneratedData(maker, phases, steps * rows * 64, rows * 64, seed)

    first, second, third = data(2, 4, 0), data(3, 3, 1), data(4, 1, 2)
    both = InTurn([first, SideBySide([second, third])])
    assert both.steps == 5
    for place in (0, 1):
        assert np.array_equal(both.batch(1)[place], first.batch(1)[place])
        beside = both.batch(4)[place]
        assert np.array_equal(beside[:3], second.batch(2)[place])
        assert np.array_equal(beside[3:], third.batch(2)[place])
    for step in (-1, 5):
        with pytest.raises(IndexError, match=f"step {step} is not one of 5"):
            both.batch(step)
    others = [InTurn([first, second]), InTurn([second, first]), SideBySide([first, second])]
    assert len({both.digest(), *(other.digest() for other in others)}) == 4


def test_rates_rise_once_more_for_problems() -> None:
    steps, config = 1464, base.RECIPE.training
    scales = [learning_rate_scale(step, steps, config) for step in range(steps)]
    assert scales[1219] < 0.01 and scales[1220] == 0.6 and scales[-1] < 0.01
    assert base.make_data is draft.RECIPE.make_data and draft.RECIPE.training == config


@pytest.fixture
def small_recipe(tokenizer: Tokenizer) -> Recipe:
    """Six steps of the reasoning recipe with a small model."""

    def make_data(tokenizer: Tokenizer, config: TrainConfig) -> GeneratedData:
        maker = ConversationRows(tokenizer, [Share(Arithmetic(), "2", 1)])
        phases = (Phase(1.0, 128),)
        return GeneratedData(maker, phases, config.token_budget, 256, config.seed)

    return Recipe("small", "Small.", SMALL, TrainConfig(6 * 256, 256, warmup_steps=2), make_data)


@pytest.fixture
def directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Options that keep the output and the cache of a run in a directory."""
    monkeypatch.setattr(recipes, "MODELS", tmp_path / "models")

    def options(name: str) -> list[str]:
        return [
            *("--output", str(tmp_path / "models" / name), "--cache", str(tmp_path / name)),
            *("--device", "cpu"),
        ]

    return options


def test_a_recipe_writes_a_model_that_runs(
    small_recipe: Recipe, directories: Callable[[str], list[str]], tmp_path: Path
) -> None:
    assert run(small_recipe, directories("small")) == 0
    output = tmp_path / "models" / "small"
    facts = json.loads((output / "training.json").read_text())
    assert facts["tokens"] == 6 * 256 and facts["parameters"] > 0
    assert "<svg" in (output / "learning-curve.svg").read_text()
    assert "python -m zoo.small" in (output / "README.md").read_text()
    with LLM(str(output)) as llm:
        [answer] = llm.generate("1+1=", SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(answer.outputs[0].token_ids) == 4
        assert llm.model_info.num_parameters == facts["parameters"]


def test_a_recipe_can_begin_with_another_model(
    small_recipe: Recipe, directories: Callable[[str], list[str]], tmp_path: Path
) -> None:
    assert run(small_recipe, directories("small")) == 0
    frozen = TrainConfig(256, 256, muon_rate=0.0, adamw_rate=0.0)
    tuned = replace(small_recipe, name="tuned", training=frozen, start="small")
    assert run(tuned, directories("tuned")) == 0
    first, second = (
        (tmp_path / "models" / name / "model.safetensors").read_bytes()
        for name in ("small", "tuned")
    )
    assert first == second


def test_large_models_are_written_in_parts(
    small_recipe: Recipe,
    directories: Callable[[str], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zoo.export.LARGEST_FILE", 600_000)
    assert run(small_recipe, directories("small")) == 0
    files = sorted((tmp_path / "models" / "small").glob("*.safetensors"))
    assert [file.name for file in files] == [
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    ]
    with LLM(str(tmp_path / "models" / "small")) as llm:
        assert llm.model_info.num_parameters > 0


def test_judgements(tokenizer: Tokenizer) -> None:
    attempts = [Attempt("Compute 1+1.", "1+1=2\nAnswer: 2", True)] * 3
    attempts += [Attempt("Compute 1+1.", "1+1=3\nAnswer: 3", False)]
    rows = JudgementRows(tokenizer, attempts)
    tokens, targets = next(rows.rows(random.Random(0), 512, 1))
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    judged = [part[0] for part in text.split("<|assistant|>\n")[1:]]
    assert learnt(tokenizer, targets) == "".join(judged)
    assert 0.2 < judged.count("1") / len(judged) < 0.8
    assert text.count("Answer: 3") == judged.count("0")
    with pytest.raises(ValueError, match="all right or all wrong"):
        JudgementRows(tokenizer, attempts[:3])


def test_the_majority() -> None:
    texts = ["Answer: 3", "Answer: 4", "nothing", "so\nAnswer: 4"]
    assert majority(texts) == 1
    assert majority(["", ""]) == 0


@pytest.mark.parametrize("module", [base, draft, long, reason, verifier])
def test_shapes_are_as_promised(module: object) -> None:
    recipe = module.RECIPE  # type: ignore[attr-defined]
    parameters = LanguageModel(recipe.model).parameter_count()
    if recipe.name == "base":
        assert recipe.model.hidden_size % 256 == recipe.model.intermediate_size % 256 == 0
        small = LanguageModel(draft.RECIPE.model).parameter_count()
        assert 0.05 < small / parameters < 0.15
    if recipe.name == "long":
        assert recipe.model.max_position_embeddings >= 8192 + 64
    assert recipe.model.vocab_size == 4096


def test_tracked_weights_are_small(repository: Path) -> None:
    ignored = (repository / ".gitignore").read_text().splitlines()
    made = {repository / line for line in ignored if line.startswith("zoo/models/")}
    found = [
        *(repository / "zoo" / "models").rglob("*.safetensors"),
        *(repository / "src").rglob("*.safetensors"),
    ]
    files = [file for file in found if file.parent not in made]
    sizes = [file.stat().st_size for file in files]
    assert sum(sizes) <= LIMIT and max(sizes) <= LIMIT // 5


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounded_weights_have_few_levels(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 96)
    rounded = round_weight(weight, bits)
    for group in rounded.unflatten(1, (-1, 32)).flatten(0, 1):
        assert len(group.unique()) <= 2**bits
    step = weight.unflatten(1, (-1, 32)).abs().amax(-1) / (2 ** (bits - 1) - 0.5)
    error = (rounded - weight).unflatten(1, (-1, 32)).abs().amax(-1)
    assert (error <= 0.5001 * step).all()


def test_a_rounded_checkpoint_runs_and_is_worse(tmp_path: Path, embedded_dir: Path) -> None:
    round_checkpoint(embedded_dir, tmp_path / "broken", 2)
    prompt = (embedded_dir / "README.md").read_text()[:2000]
    losses = []
    for directory in (embedded_dir, tmp_path / "broken"):
        with LLM(str(directory)) as llm:
            params = SamplingParams(max_tokens=0, prompt_logprobs=0)
            [output] = llm.generate([prompt], params)
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        losses.append(-sum(entry[token].logprob for token, entry in pairs if entry))
    assert losses[1] > 1.05 * losses[0]
