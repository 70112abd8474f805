"""Early exits: tokens leave layers out, and the cache is what it is without."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace import LLM, RequestOutput, SamplingParams
from headrace.contracts.profile import Profile
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.exec.exits.early_exit import CONFIDENCE, calibrate, fit_exit
from tests.models.expected import DEEP, TOLERANCE, Expected, greedy, load, prompt_of, save_deep
from tests.support.adapters import write_adapter
from tests.support.logits import LogitsRecorder

NAME = "early-exit"
EXITS, DEFER = (2, 4), 3
METHOD = f"{NAME}:layers=2+4,defer={DEFER}"

Map = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return save_deep(tmp_path_factory.mktemp("deep"))


def streams(expected: Expected, tokens: list[int]) -> tuple[Tensor, ...]:
    """What enters each layer, ``[tokens, hidden]``; behind the last, with the final norm."""
    with torch.inference_mode():
        out = expected.model(torch.tensor([tokens]), output_hidden_states=True)
    return tuple(hidden[0] for hidden in out.hidden_states)


@torch.inference_mode()
def exit_logits(expected: Expected, hidden: Tensor) -> Tensor:
    logits: Tensor = expected.model.lm_head(expected.model.model.norm(hidden))
    return logits


@pytest.fixture(scope="module")
def threshold(expected: Expected) -> float:
    return middle_threshold(expected)


def middle_threshold(expected: Expected) -> float:
    """About half of the tokens leave at the first exit with it."""
    entering = streams(expected, prompt_of(200))[EXITS[0]]
    probabilities = exit_logits(expected, entering).softmax(-1)
    return float(CONFIDENCE["probability"](probabilities).median())


@dataclass
class Replay:
    """What a completion should have been drawn from, and where each of its tokens left.

    Attributes:
        logits: ``[tokens, vocab]``.
        depths: layers that each went through when the next was drawn.
        passed: inputs of all layers together, from the first drawn token on.
    """

    logits: Tensor
    depths: list[int]
    passed: int


def replay(
    expected: Expected,
    prompt: list[int],
    tokens: Sequence[int],
    threshold: float,
    exits: Sequence[int] = EXITS,
    most: int = DEFER,
    maps: dict[int, Map] | None = None,
) -> Replay:
    """Token by token. Each layer sees all tokens before, since what waits is made up for."""
    layers = expected.model.config.num_hidden_layers
    known = [*prompt, *tokens]
    entering = streams(expected, known)
    rows, depths, passed = [expected.logits(known)[len(prompt) - 1]], [layers], 0
    waiting = dict.fromkeys(exits, 0)
    for place in range(len(prompt), len(known) - 1):
        passing, begin = 1, 0
        depths.append(layers)
        rows.append(expected.logits(known)[place])
        for exit in exits:
            passed += passing * (exit - begin)
            begin = exit
            hidden = entering[exit][place]
            logits = exit_logits(expected, maps[exit](hidden) if maps else hidden)
            room = sum(waiting.values()) + passing <= most
            if room and float(logits.softmax(-1).max()) >= threshold:
                waiting[exit] += passing
                depths[-1], rows[-1] = exit, logits
                break
            passing += waiting[exit]
            waiting[exit] = 0
        else:
            passed += passing * (layers - begin)
    return Replay(torch.stack(rows), depths, passed)


def check(
    expected: Expected,
    recorder: LogitsRecorder,
    output: RequestOutput,
    threshold: float,
    **options: Any,
) -> list[int]:
    """The depths of all completions' tokens, when their logits have been compared."""
    assert output.error is None
    depths = []
    for index, completion in enumerate(output.outputs):
        assert completion.token_ids
        wanted = replay(
            expected, output.prompt_token_ids, completion.token_ids, threshold, **options
        )
        error = (recorder.logits(output, index) - wanted.logits).abs().max().item()
        assert error < TOLERANCE
        depths += wanted.depths
    return depths


def left_at(
    expected: Expected, recorder: LogitsRecorder, output: RequestOutput, index: int, exit: int
) -> list[bool]:
    """Whether each token of a completion was drawn from an exit; else it was from the model."""
    prompt, tokens = output.prompt_token_ids, output.outputs[index].token_ids
    early = exit_logits(expected, streams(expected, [*prompt, *tokens])[exit])[len(prompt) - 1 : -1]
    found = recorder.logits(output, index)
    whole = (found - expected.sampled_logits(output, index)).abs().amax(1) < TOLERANCE
    left = (found - early).abs().amax(1) < TOLERANCE
    assert (whole ^ left).all()
    assert not left[0]
    return [bool(each) for each in left]


def layers_of(llm: LLM) -> Any:
    runner: Any = llm.engine.runner
    return runner._forward.loop._model.layers


def count_inputs(llm: LLM) -> list[int]:
    """The inputs of each layer's calls, from now on."""
    counts: list[int] = []
    for layer in layers_of(llm):
        feed = layer.feed

        def counting(hidden: Tensor, feed: Any = feed) -> Any:
            counts.append(len(hidden))
            return feed(hidden)

        layer.feed = counting
    return counts


@pytest.mark.parametrize("options", [{}, {"reference": True}], ids=["fast", "reference"])
def test_rows_of_one_batch_leave_where_they_are_sure(
    expected: Expected, threshold: float, options: dict[str, Any]
) -> None:
    """Chunks of prompts, plain rows and rows with several thresholds share steps."""
    prompts = [prompt_of(length) for length in (23, 9, 31, 1, 12, 14)]
    wanted = [threshold, 0.0, 2.0, threshold, 2.0, threshold]
    choices: list[Any] = [{NAME: {"threshold": each}} for each in wanted]
    choices[4] = {}
    with load(expected.directory, methods=(METHOD,), max_num_batched_tokens=16, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(16), methods=choices)
        llm.engine.check_integrity()
    depths = [
        check(expected, recorder, output, each)
        for output, each in zip(outputs, wanted, strict=True)
    ]
    assert depths[1] == [DEEP, *([2] * DEFER + [DEEP]) * 4][:16]
    assert set(depths[2]) == set(depths[4]) == {DEEP}
    assert {2, 4, DEEP} == set(depths[0]) | set(depths[3]) | set(depths[5])
    mixed = [step for step in recorder.steps if {row.is_decode for row in step} == {True, False}]
    assert any(row.is_chunk for step in mixed for row in step)


def test_a_token_that_waits_at_both_exits(expected: Expected, threshold: float) -> None:
    """What has gone on from one exit waits at the next, behind nothing that is younger."""
    most = 9
    method = f"{NAME}:layers=2+4,defer={most},threshold={threshold}"
    seen = set()
    with load(expected.directory, methods=(method,)) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate([prompt_of(11, seed) for seed in range(4)], greedy(24))
    for output in outputs:
        depths = check(expected, recorder, output, threshold, most=most)
        seen |= set(itertools.pairwise(depths))
    assert {(2, 4), (4, 2), (2, DEEP), (4, DEEP)} <= seen


def test_the_cache_is_bit_for_bit_that_of_the_model(
    expected: Expected, threshold: float, tmp_path: Path
) -> None:
    """Tokens that went through all layers, of the model alone and beside an adapter."""
    adapter = write_adapter(expected.directory, tmp_path / "tuned", 1)
    prompt = prompt_of(13)
    method = f"{METHOD},threshold={threshold}"
    for name in (None, "tuned"):
        options: dict[str, Any] = {"reference": True, "adapters": {"tuned": adapter}}
        with load(expected.directory, methods=(method,), **options) as llm:
            recorder = LogitsRecorder(llm)
            [output] = llm.generate([prompt], greedy(14), adapter=name)
            tokens = output.outputs[0].token_ids
            found = recorder.logits(output)
            texts = [[*prompt, *tokens[:count]] for count in range(len(tokens))]
            plain = [
                recorder.logits(each)[0]
                for each in llm.generate(texts, greedy(1), adapter=name, methods={})
            ]
        same = [torch.equal(*pair) for pair in zip(found, plain, strict=True)]
        assert same[0] and 2 < sum(same) < len(same), "none left, or none came back"


@pytest.mark.parametrize("options", [{}, {"reference": True}], ids=["fast", "reference"])
def test_above_1_none_ever_leaves(expected: Expected, options: dict[str, Any]) -> None:
    prompts = [prompt_of(length) for length in (23, 9)]
    found = []
    for methods in ((), (f"{METHOD},threshold=1.1",)):
        with load(expected.directory, methods=methods, **options) as llm:
            recorder = LogitsRecorder(llm)
            outputs = llm.generate(prompts, greedy(6))
            found.append([recorder.logits(output) for output in outputs])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_plain_requests_compute_what_they_compute_without_the_method(expected: Expected) -> None:
    """Alone with the fast operations; in reference mode, beside rows that leave."""
    prompts = [prompt_of(length) for length in (23, 9)]
    for options, others in (({}, []), ({"reference": True}, [prompt_of(8)])):
        found = []
        for methods in ((), (f"{METHOD},threshold=0",)):
            with load(expected.directory, methods=methods, **options) as llm:
                recorder = LogitsRecorder(llm)
                choices: list[Any] = [{}, {}, *[None] * len(others)]
                outputs = llm.generate([*prompts, *others], greedy(6), methods=choices)
                found.append([recorder.logits(output) for output in outputs[:2]])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_layers_are_run_less_often_and_for_each_token_once(
    expected: Expected, threshold: float
) -> None:
    prompt = prompt_of(12)
    for exits, most in ((EXITS, DEFER), ((3,), 5)):
        listed = "+".join(map(str, exits))
        method = f"{NAME}:layers={listed},defer={most},threshold={threshold}"
        with load(expected.directory, methods=(method,)) as llm:
            counts = count_inputs(llm)
            [output] = llm.generate([prompt], greedy(20))
        tokens = output.outputs[0].token_ids
        wanted = replay(expected, prompt, tokens, threshold, exits, most)
        assert sum(counts) == 12 * DEEP + wanted.passed <= (12 + 19) * DEEP
        assert len(counts) == sum(wanted.depths) < 16 * DEEP


def test_completions_of_one_prompt(expected: Expected, threshold: float) -> None:
    """Each has its own tokens that wait."""
    params = SamplingParams(n=4, seed=0, max_tokens=9, ignore_eos=True, detokenize=False)
    options: dict[str, Any] = {"methods": (f"{METHOD},threshold={threshold}",), "block_size": 4}
    with load(expected.directory, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate([prompt_of(17), prompt_of(9)], params, methods=[None, {}])
        llm.engine.check_integrity()
    assert len({tuple(each.token_ids) for each in outputs[0].outputs}) > 1
    assert {2, DEEP} <= set(check(expected, recorder, outputs[0], threshold))
    assert set(check(expected, recorder, outputs[1], 2.0)) == {DEEP}


def test_completions_that_wait_for_a_row(expected: Expected) -> None:
    """They compute the prompt and their first token again, in a row that another one had."""
    params = SamplingParams(n=4, seed=0, max_tokens=9, ignore_eos=True, detokenize=False)
    options: dict[str, Any] = {"methods": (f"{METHOD},threshold=0",), "max_num_seqs": 2}
    with load(expected.directory, **options) as llm:
        recorder = LogitsRecorder(llm)
        [output] = llm.generate([prompt_of(17)], params)
        llm.engine.check_integrity()
    for index in range(4):
        left = left_at(expected, recorder, output, index, 2)
        assert left[2:6] in ([True, True, False, True], [True, True, True, False])


def test_preempted_sequences(expected: Expected) -> None:
    """What waited is fed again, through all layers; from there on it goes on as ever."""
    prompts = [prompt_of(20, seed) for seed in range(4)]
    memory = expected.cache_bytes(90)
    options: dict[str, Any] = {"methods": (f"{METHOD},threshold=0",), "block_size": 4}
    with load(expected.directory, kv_cache_memory_bytes=memory, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(24), methods=[None, {}, None, None])
        assert llm.stats().preemptions > 0
        llm.engine.check_integrity()
    begun_anew = False
    for index, output in enumerate(outputs):
        if index == 1:
            assert set(check(expected, recorder, output, 2.0)) == {DEEP}
            continue
        left = left_at(expected, recorder, output, 0, 2)
        runs = [len(run) for run in "".join("x" if each else " " for each in left).split(" ")]
        assert max(runs) == DEFER
        begun_anew |= runs[1:-1] != [DEFER] * (len(runs) - 2)
    assert begun_anew


def test_what_is_shared(expected: Expected) -> None:
    """The prompt's pages; what the sequence before left waiting in the same row is forgotten."""
    prompt = prompt_of(18)
    with load(expected.directory, methods=(f"{METHOD},threshold=0",), block_size=4) as llm:
        recorder = LogitsRecorder(llm)
        for count, cached in ((3, 0), (10, 16), (4, 16), (9, 16)):
            [output] = llm.generate([prompt], greedy(count))
            assert output.metrics is not None
            assert output.metrics.num_cached_tokens == cached
            assert 2 in check(expected, recorder, output, 0.0)
        [longer] = llm.generate([[*prompt, *output.outputs[0].token_ids]], greedy(5))
        assert longer.metrics is not None and longer.metrics.num_cached_tokens == 16
        check(expected, recorder, longer, 0.0)
        profile = Profile(llm.methods.methods)
        llm.engine.add_request("given up", prompt_of(30), greedy(30), profile=profile)
        for _ in range(4):
            llm.engine.step()
        llm.engine.abort_request("given up")
        [output] = llm.generate([prompt], greedy(6))
        check(expected, recorder, output, 0.0)
        assert llm.stats().pages_cached == 4 + 2 + 7, "prompts alone are kept"


def test_beside_neurons_in_part(expected: Expected) -> None:
    """Tokens that waited go through the neurons of their own request, bit for bit."""
    params = greedy(9, logit_bias={7: 100.0})
    found = []
    for more in ((), (f"{METHOD},threshold=0",)):
        methods = ("core-infer:keep=0.3", *more)
        with load(expected.directory, methods=methods, reference=True) as llm:
            recorder = LogitsRecorder(llm)
            outputs = llm.generate([prompt_of(9), prompt_of(14)], params)
            assert all(set(each.outputs[0].token_ids) == {7} for each in outputs)
            found.append([recorder.logits(output) for output in outputs])
    for alone, beside in zip(*found, strict=True):
        same = [torch.equal(*pair) for pair in zip(alone, beside, strict=True)]
        assert same == [True, False, False, False, True, False, False, False, True]


@pytest.mark.parametrize("name", ["qwen3_next", "smollm3"])
def test_layers_of_other_kinds(expectations: Callable[[str], Expected], name: str) -> None:
    """Recurrent states too are those of the tokens that a layer has seen."""
    expected = expectations(name)
    with load(expected.directory, methods=(f"{NAME}:layers=1+3,defer=4",)) as llm:
        recorder = LogitsRecorder(llm)
        choices: list[Any] = [{NAME: {"threshold": each}} for each in (0.0, 0.02, 0.01)]
        prompts = [prompt_of(length) for length in (9, 17, 6)]
        outputs = llm.generate(prompts, greedy(12), methods=choices)
    for output, each in zip(outputs, (0.0, 0.02, 0.01), strict=True):
        depths = check(expected, recorder, output, each, exits=(1, 3), most=4)
        assert {1, expected.model.config.num_hidden_layers} <= set(depths)


@pytest.fixture(scope="module")
def tuned(expected: Expected, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads for both exits, out of what a recorder has kept."""
    params = SamplingParams(seed=0, max_tokens=120, ignore_eos=True, detokenize=False)
    kept: dict[str, Any] = {}
    for site in ("hidden", "final"):
        with load(expected.directory, methods=(f"activation-recorder:at={site}",)) as llm:
            llm.generate([prompt_of(3, seed) for seed in range(48)], params)
            recorder: Any = llm.methods.taps["activation-recorder"]
            kept[site] = {layer: torch.stack(rows) for layer, rows in recorder.take().items()}
    assert sorted(kept["hidden"]) == list(range(DEEP))
    assert list(kept["final"]) == [DEEP - 1]
    found = {}
    for exit in EXITS:
        fitted = fit_exit(kept["hidden"][exit], kept["final"][DEEP - 1])
        for name, tensor in fitted.items():
            found[f"{exit}.{name}"] = tensor
    path = tmp_path_factory.mktemp("heads") / "heads.safetensors"
    save_file(found, path)
    return path


class TestHeads:
    """What is fitted to the model's own results agrees with the model more often."""

    def maps(self, tuned: Path) -> dict[int, Map]:
        found = load_file(tuned)

        def added(exit: int) -> Map:
            weight, bias = found[f"{exit}.weight"], found[f"{exit}.bias"]
            return lambda hidden: hidden + hidden @ weight.T + bias

        return {exit: added(exit) for exit in EXITS}

    def test_leaving_rows_answer_through_them(self, expected: Expected, tuned: Path) -> None:
        method = f"{METHOD},threshold=0.05,heads={tuned}"
        with load(expected.directory, methods=(method,)) as llm:
            recorder = LogitsRecorder(llm)
            prompts = [prompt_of(length) for length in (9, 20, 5)]
            outputs = llm.generate(prompts, greedy(12))
        maps = self.maps(tuned)
        depths = [check(expected, recorder, output, 0.05, maps=maps) for output in outputs]
        assert {*EXITS, DEEP} == {each for row in depths for each in row}

    def test_they_agree_with_the_model_as_often_as_calibrated(
        self, expected: Expected, tuned: Path
    ) -> None:
        texts = [prompt_of(240, seed) for seed in range(12)]
        by, target = self.maps(tuned)[EXITS[1]], 0.6

        def measured(part: slice, by: Map) -> tuple[Tensor, Tensor]:
            inputs = torch.cat([streams(expected, text)[EXITS[1]] for text in texts[part]])
            model = torch.cat([expected.logits(text) for text in texts[part]]).argmax(-1)
            logits = exit_logits(expected, by(inputs))
            return CONFIDENCE["probability"](logits.softmax(-1)), logits.argmax(-1) == model

        threshold = calibrate(*measured(slice(6), by), target)
        sure, agrees = measured(slice(6, None), by)
        _, plain = measured(slice(6, None), lambda hidden: hidden)
        assert agrees.float().mean() > plain.float().mean() + 0.1
        leaving = agrees[sure >= threshold].float()
        assert len(leaving) > 200
        # Three standard errors: a threshold is drawn from data as well.
        slack = 3 * (target * (1 - target) / len(leaving)) ** 0.5
        assert leaving.mean() >= target - slack > agrees.float().mean() + 0.1

    def test_files_that_do_not_fit(self, expected: Expected, tmp_path: Path) -> None:
        wrong = tmp_path / "wrong.safetensors"
        save_file({"2.weight": torch.zeros(64, 32), "2.bias": torch.zeros(64)}, wrong)
        square = {"2.weight": torch.zeros(64, 64), "2.bias": torch.zeros(64)}
        lacking = tmp_path / "lacking.safetensors"
        save_file(square, lacking)
        for path, message in (
            (wrong, r"heads: 2.weight must be \[64, 64\], .* has \[64, 32\]"),
            (lacking, r"heads: 4.weight must be \[64, 64\], .* has none"),
            (tmp_path / "none", "heads: .*none cannot be read"),
        ):
            with pytest.raises(ConfigurationError, match=f"method: {NAME}: {message}"):
                load(expected.directory, methods=(f"{METHOD},heads={path}",))


def test_a_fit_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(400, 12, generator=generator) + 3
    weight = torch.randn(12, 12, generator=generator)
    found = fit_exit(known, known + known @ weight.T + 2, ridge=1e-9)
    torch.testing.assert_close(found["weight"], weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["bias"], torch.full((12,), 2.0), atol=1e-3, rtol=0)
    strong = fit_exit(known, known + known @ weight.T + 2, ridge=1e9)
    assert strong["weight"].abs().max() < 1e-6


def test_thresholds() -> None:
    sure = torch.tensor([0.9, 0.5, 0.8, 0.5, 0.2])
    agrees = torch.tensor([True, True, True, False, True])
    assert calibrate(sure, agrees, 1.0) == pytest.approx(0.8)
    assert calibrate(sure, agrees, 0.75) == pytest.approx(0.2)
    assert calibrate(sure[:4], agrees[:4], 0.9) == pytest.approx(0.8), "equals leave together"
    assert calibrate(sure, ~agrees, 0.5) == float("inf")


@pytest.mark.parametrize("confidence", list(CONFIDENCE))
def test_confidence_goes_from_0_to_1(confidence: str) -> None:
    even, certain = torch.full((1, 8), 1 / 8), torch.eye(8)[:1]
    between = torch.tensor([[0.5, 0.25, 0.25, 0, 0, 0, 0, 0]])
    low, middle, high = (CONFIDENCE[confidence](each).item() for each in (even, between, certain))
    assert low == pytest.approx(1 / 8 if confidence == "probability" else 0.0, abs=1e-6)
    assert middle == pytest.approx({"probability": 0.5, "margin": 0.25, "entropy": 0.5}[confidence])
    assert high == pytest.approx(1.0)


def test_requests_choose_their_threshold_alone(expected: Expected) -> None:
    with load(expected.directory, methods=(METHOD,)) as llm:
        for options, message in (
            ({"threshold": -1.0}, "threshold must be at least 0, got -1.0"),
            ({"defer": 2}, "is not for requests; those that are: threshold"),
        ):
            with pytest.raises(InvalidRequestError, match=message):
                llm.generate([prompt_of(4)], greedy(1), methods={NAME: options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "layers: name those to leave before, as in 4\\+8; got ''"),
        ("layers=2+x", "layers: name those to leave before"),
        ("layers=4+2", "layers must be ascending, got 4, 2"),
        ("layers=2+6", "layers must be from 1 to 5 for this model, got 6"),
        ("layers=0", "layers must be from 1 to 5 for this model, got 0"),
        ("layers=2,threshold=nan", "threshold must be at least 0, got nan"),
        ("layers=2,confidence=mood", "confidence must be one of probability, margin, entropy"),
        ("layers=2,defer=0", "defer must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(expected: Expected, options: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=f"method: {NAME}: {message}"):
        load(expected.directory, methods=(f"{NAME}:{options}",))


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("gemma2", "1", "needs layers behind an exit that keep all of their KV; layer 2 here"),
        ("mistral", "1", "needs layers behind an exit that keep all of their KV; layer 1 here"),
    ],
)
def test_models_that_it_is_not_for(
    expectations: Callable[[str], Expected], name: str, layers: str, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"method: {NAME}: {message}"):
        load(expectations(name).directory, methods=(f"{NAME}:layers={layers}",))


@pytest.mark.parametrize("other", ["random-eviction", "h2o", "kivi", "activation-recorder"])
def test_what_does_not_go_with_it(expected: Expected, other: str) -> None:
    message = f"method: {other} needs that a token has gone through its layers"
    with pytest.raises(ConfigurationError, match=message):
        load(expected.directory, methods=(METHOD, other))
