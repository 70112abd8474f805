"""Tokens that layers drop: logits are those of transformers, layer by layer, on what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace import RequestOutput, SamplingParams
from headrace.contracts.cache import attention_state, layout_of
from headrace.contracts.kv_codec import KVCodec
from headrace.contracts.profile import Profile
from headrace.contracts.step import Pooling
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.exec.pruning.slim_infer import SlimInfer
from tests.models.expected import DEEP, TOLERANCE, Expected, greedy, load, prompt_of, save_deep
from tests.support.logits import LogitsRecorder

BEGINS, SHARES = (2, 4), (0.5, 0.25)
SPAN, BLOCK, UNIT, PAGE = 32, 4, 2, 4
NAME = "slim-infer"
METHOD = f"{NAME}:layers=2+4,keep=0.5+0.25,span={SPAN},block={BLOCK},unit={UNIT}"
OPTIONS: dict[str, Any] = {"block_size": PAGE, "max_num_seqs": 4, "max_num_batched_tokens": 36}


POOLINGS: tuple[Pooling, ...] = ("mean", "first")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return save_deep(tmp_path_factory.mktemp("deep"))


def parts_of(prompt: int) -> list[tuple[int, int]]:
    """Where the parts of a prompt begin and end."""
    return [(start, min(start + SPAN, prompt)) for start in range(0, prompt, SPAN)]


def num_left(tokens: int, share: float) -> int:
    """Of a part, in a stage."""
    blocks, rest = divmod(tokens, BLOCK)
    return min(blocks, max(2, math.ceil(blocks * share))) * BLOCK + rest


class PrunedModel:
    """The layers of transformers one after another, with a list of keys and values for each.

    Of full units in that list, what a codec makes of them is read. ``kept`` are the positions of
    the tokens that each layer has, ``positions`` those of the inputs of the layer that runs.
    """

    def __init__(self, expected: Expected, codec: KVCodec | None = None, unit: int = 0) -> None:
        self.model, self.codec, self.unit = expected.model, codec, unit
        self.positions = torch.zeros(0, dtype=torch.int64)
        self.kept = [torch.zeros(0, dtype=torch.int64) for _ in range(DEEP)]
        self.coded = [0] * DEEP
        heads = self.model.config.num_key_value_heads
        width = self.model.config.hidden_size // self.model.config.num_attention_heads
        self.keys = [torch.zeros(heads, 0, width) for _ in range(DEEP)]
        self.values = [torch.zeros(heads, 0, width) for _ in range(DEEP)]

    def attend(self, index: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What attention makes of inputs, and the probabilities ``[heads, queries, slots]``."""
        self.positions = positions
        layer = self.model.model.layers[index].self_attn
        heads, kv_heads = (
            self.model.config.num_attention_heads,
            self.model.config.num_key_value_heads,
        )
        q, k, v = (
            part(hidden).view(len(hidden), count, -1)
            for part, count in (
                (layer.q_proj, heads),
                (layer.k_proj, kv_heads),
                (layer.v_proj, kv_heads),
            )
        )
        cos, sin = self.model.model.rotary_emb(hidden[None], positions[None])

        def turn(x: Tensor) -> Tensor:
            low, high = x.chunk(2, dim=-1)
            return x * cos[0, :, None] + torch.cat((-high, low), -1) * sin[0, :, None]

        self.keys[index] = torch.cat((self.keys[index], turn(k).transpose(0, 1)), 1)
        self.values[index] = torch.cat((self.values[index], v.transpose(0, 1)), 1)
        self.kept[index] = torch.cat((self.kept[index], positions))
        keys, values = (
            each[index].repeat_interleave(heads // kv_heads, 0) for each in (self.keys, self.values)
        )
        scores = turn(q).transpose(0, 1) @ keys.mT * q.shape[-1] ** -0.5
        future = self.kept[index][None, :] > positions[:, None]
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return layer.o_proj((weights @ values).transpose(0, 1).flatten(1)), weights

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int], start: int, pruned: bool) -> Tensor:
        """Logits ``[n, vocab]`` after the tokens that went through all layers."""
        positions = torch.arange(start, start + len(tokens))
        hidden = self.model.model.embed_tokens(torch.tensor(tokens))
        weights = torch.zeros(0)
        for index, layer in enumerate(self.model.model.layers):
            if pruned and index in BEGINS:
                share = SHARES[BEGINS.index(index)]
                chosen = self.choose(weights[..., -len(hidden) :], start, len(tokens), share)
                hidden, positions = hidden[chosen], positions[chosen]
            mixed, weights = self.attend(index, layer.input_layernorm(hidden), positions)
            hidden = hidden + mixed
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.code()
        logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        return logits

    @staticmethod
    def choose(weights: Tensor, start: int, part: int, share: float) -> list[int]:
        """Places of the tokens that go on: block by block, in plain loops."""
        tokens = weights.shape[-1]
        got = weights[:, -BLOCK:].mean((0, 1))
        blocks = [range(i, i + BLOCK) for i in range(0, tokens - BLOCK + 1, BLOCK)]
        always = {len(blocks) - 1} | ({0} if start == 0 else set())
        score = [
            max(float(got[i : i + UNIT].mean()) for i in range(each.start, each.stop, UNIT))
            for each in blocks
        ]
        order = sorted(range(len(blocks)), key=lambda i: (i not in always, -score[i]))
        count = num_left(part, share) // BLOCK
        stay = [place for i in sorted(order[:count]) for place in blocks[i]]
        return [*stay, *range(len(blocks) * BLOCK, tokens)]

    def code(self) -> None:
        """Replace full units by what is read of them."""
        if self.codec is None:
            return
        for index in range(DEEP):
            while self.coded[index] + self.unit <= self.keys[index].shape[1]:
                part = slice(self.coded[index], self.coded[index] + self.unit)
                found = self.codec.encode(self.keys[index][:, part], self.values[index][:, part])
                near = self.codec.decode({name: each[None] for name, each in found.items()})
                self.keys[index][:, part], self.values[index][:, part] = near[0][0], near[1][0]
                self.coded[index] += self.unit


def pruned_logits(
    expected: Expected,
    output: RequestOutput,
    index: int = 0,
    beside: Callable[[PrunedModel], AbstractContextManager[None]] | None = None,
    **options: Any,
) -> Tensor:
    """``[tokens, vocab]``: from what each token of a completion should have been drawn.

    ``beside`` changes the model.
    """
    prompt, tokens = output.prompt_token_ids, output.outputs[index].token_ids
    model = PrunedModel(expected, **options)
    with nullcontext() if beside is None else beside(model):
        for start, end in parts_of(len(prompt)):
            logits = model.feed(prompt[start:end], start, True)
        rows = [logits[-1]]
        for place, token in enumerate(tokens[:-1], len(prompt)):
            rows.append(model.feed([token], place, False)[0])
    for layer, kept in enumerate(model.kept):
        stage = sum(begin <= layer for begin in BEGINS)
        left = [
            num_left(end - start, SHARES[stage - 1]) if stage else end - start
            for start, end in parts_of(len(prompt))
        ]
        assert len(kept) == sum(left) + len(tokens) - 1
    return torch.stack(rows)


def error_of(
    expected: Expected, recorder: LogitsRecorder, output: RequestOutput, **options: Any
) -> float:
    assert output.error is None
    return max(
        float(
            (recorder.logits(output, i) - pruned_logits(expected, output, i, **options)).abs().max()
        )
        for i in range(len(output.outputs))
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"reference": True}, {"max_num_batched_tokens": 200}, {"block_size": 32}],
    ids=["fast", "reference", "large steps", "parts that begin within pages"],
)
def test_logits_on_what_is_left(expected: Expected, options: dict[str, Any]) -> None:
    """Beside plain requests; what is computed for one does not depend on what shares the steps."""
    prompts = [prompt_of(length) for length in (75, 21, 7, 50, 32, 97)]
    choices: list[Any] = [None, None, None, {}, None, None]
    with load(expected.directory, methods=(METHOD,), **{**OPTIONS, **options}) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, greedy(9), methods=choices)
        llm.engine.check_integrity()
        assert llm.stats().pages_used == 0
    for output, choice in zip(outputs, choices, strict=True):
        plain = (recorder.logits(output) - expected.sampled_logits(output)).abs().max()
        if choice is None:
            assert error_of(expected, recorder, output) < TOLERANCE
            assert (plain > 100 * TOLERANCE) == (len(output.prompt_token_ids) > 7)
        else:
            assert plain < TOLERANCE
    assert any(len({row.is_decode for row in step}) == 2 for step in recorder.steps)


def test_plain_rows_compute_bit_for_bit_what_they_compute_alone(expected: Expected) -> None:
    prompts = [prompt_of(length) for length in (40, 9)]
    for options, others in (({}, []), ({"reference": True}, [prompt_of(60)])):
        found = []
        for methods in ((), (METHOD,)):
            with load(expected.directory, methods=methods, **OPTIONS, **options) as llm:
                recorder = LogitsRecorder(llm)
                choices: list[Any] = [{}, {}, *[None] * len(others)]
                outputs = llm.generate([*prompts, *others], greedy(6), methods=choices)
                found.append([recorder.logits(output) for output in outputs[:2]])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_rows_and_pages_are_fewer(expected: Expected) -> None:
    prompt = prompt_of(75)
    counts = [0] * DEEP
    with load(expected.directory, methods=(METHOD,), **OPTIONS) as llm:
        for index, layer in enumerate(llm.engine.runner._forward.loop._model.layers):

            def counted(
                hidden: Tensor, *rest: Any, inner: Any = layer.feed, at: int = index
            ) -> Any:
                counts[at] += len(hidden)
                return inner(hidden)

            layer.feed = counted
        llm.generate([prompt], greedy(3))
        layout = llm.engine.scheduler.accounting.layout
        peak = llm.stats().pages_peak
        assert llm.stats().pages_cached == 0
    left = [75, *(sum(num_left(n, share) for n in (32, 32, 11)) for share in SHARES)]
    assert left == [75, 43, 27]
    assert [group.layers for group in layout.groups] == [(0, 1), (2, 3), (4, 5)]
    assert counts == [count + 2 for count in left for _ in range(2)]
    assert peak == sum(layout.pages_for(count + 2) for count in left)


def test_attention_is_planned_for_the_layers_to_come(
    expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[tuple[int, list[bool]]] = []
    with load(expected.directory, methods=(METHOD,), **OPTIONS) as llm:
        builder = llm.engine.runner._forward.builder
        inner = builder.build

        def build(rows: Any, tables: Any, first: int = 0) -> Any:
            batches = inner(rows, tables, first)
            planned.extend((first, [plan is not None for plan in b.attention]) for b in batches)
            return batches

        monkeypatch.setattr(builder, "build", build)
        llm.generate([prompt_of(30)], greedy(1))
    assert planned == [(0, [True] * 3), (2, [False, True, True]), (4, [False, False, True])]


def test_completions_of_one_prompt(expected: Expected) -> None:
    params = SamplingParams(n=4, seed=0, max_tokens=9, ignore_eos=True, detokenize=False)
    for rows in (4, 2):
        options = {**OPTIONS, "max_num_seqs": rows}
        with load(expected.directory, methods=(METHOD,), **options) as llm:
            recorder = LogitsRecorder(llm)
            [output] = llm.generate([prompt_of(41)], params)
            llm.engine.check_integrity()
            assert llm.stats().pages_used == 0
        assert len({tuple(each.token_ids) for each in output.outputs}) > 1
        assert error_of(expected, recorder, output) < TOLERANCE


def test_preempted_sequences_come_out_the_same(expected: Expected) -> None:
    prompts = [prompt_of(40, seed) for seed in range(4)]
    options = {**OPTIONS, "reference": True, "methods": (METHOD,)}
    with load(expected.directory, **options) as llm:
        alone = [llm.generate([prompt], greedy(40, logprobs=1))[0] for prompt in prompts]
    memory = expected.cache_bytes(90)
    with load(expected.directory, kv_cache_memory_bytes=memory, **options) as llm:
        together = llm.generate(prompts, greedy(40, logprobs=1))
        assert llm.stats().preemptions > 0
        assert llm.stats().pages_used == 0
        llm.engine.check_integrity()
    for one, other in zip(alone, together, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs


def test_nothing_is_shared_and_requests_choose(expected: Expected) -> None:
    """Plain requests share their prefixes as ever."""
    prompt = prompt_of(50)
    with load(expected.directory, methods=(METHOD,), **OPTIONS) as llm:
        recorder = LogitsRecorder(llm)
        choices: list[Any] = [{}, {}, None, None, {NAME: {"keep": "1+1"}}]
        outputs = [llm.generate([prompt], greedy(4), methods=choice)[0] for choice in choices]
        with pytest.raises(InvalidRequestError, match="keep: give a share for each of the layers"):
            llm.generate([prompt], greedy(4), methods={NAME: {"keep": "0.5"}})
    cached = [each.metrics.num_cached_tokens for each in outputs if each.metrics]
    assert cached == [0, 48, 0, 0, 0]
    assert error_of(expected, recorder, outputs[3]) < TOLERANCE
    for output in (outputs[1], outputs[4]):
        assert (recorder.logits(output) - expected.sampled_logits(output)).abs().max() < TOLERANCE


def test_what_needs_all_tokens_is_refused(expected: Expected) -> None:
    with load(expected.directory, methods=(METHOD,), **OPTIONS) as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        with pytest.raises(InvalidRequestError, match="slim-infer drops tokens of the prompt"):
            llm.generate([prompt_of(20)], params)
        assert llm.generate([prompt_of(20)], params, methods={})[0].prompt_logprobs
        for pooling in POOLINGS:
            profile = Profile(methods=llm.methods.choose(None))
            with pytest.raises(InvalidRequestError, match="the embedding is made of all tokens"):
                llm.engine.check_request(prompt_of(40), greedy(0), pooling, profile)
            llm.engine.check_request(prompt_of(40), greedy(0), pooling)
            llm.engine.check_request(prompt_of(11), greedy(0), pooling, profile)


def test_what_needs_all_tokens_goes_where_none_is_dropped(expected: Expected) -> None:
    """Beside a prompt that loses some."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    prompts = [prompt_of(11), prompt_of(20), prompt_of(30)]
    choices: list[Any] = [None, {NAME: {"keep": "1+1"}}, None]
    with load(expected.directory, methods=(METHOD,), **OPTIONS) as llm:
        plain = [llm.generate([prompt], params, methods={})[0] for prompt in prompts[:2]]
        found = llm.generate(prompts, [params, params, greedy(1)], methods=choices)
        llm._embedding = replace(llm._embedding, pooling="mean")
        for choice, prompt in zip(choices, prompts[:2], strict=False):
            [one], [other] = (llm.embed([prompt], methods=each) for each in (choice, {}))
            assert one.embedding is not None and other.embedding is not None
            assert abs(one.embedding - other.embedding).max() < TOLERANCE
        with pytest.raises(InvalidRequestError, match="slim-infer drops tokens of the prompt"):
            llm.generate([prompt_of(32 + 12)], params)
    for one, other in zip(plain, found, strict=False):
        assert one.prompt_logprobs and other.prompt_logprobs
        for pair in zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True):
            mine, theirs = (
                [each.logprob for each in (logprobs or {}).values()] for logprobs in pair
            )
            assert mine and mine == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("layers", [16, 24, 28, 32, 36, 40, 48, 64, 80])
def test_pages_are_full_by_default(layers: int) -> None:
    state = attention_state(8, 128, "bfloat16")
    layout = layout_of([state] * layers, 16, SlimInfer().begins(layers))
    assert layout.token_bytes == layout_of([state] * layers, 16).token_bytes
    assert len(layout.groups) == 4


@pytest.mark.parametrize("choice", [{}, None], ids=["plain", "pruned"])
def test_what_is_not_a_number_fails_the_row(
    expected: Expected, choice: dict[str, Any] | None
) -> None:
    with load(expected.directory, methods=(METHOD,), **OPTIONS) as llm:
        layer = llm.engine.runner._forward.loop._model.layers[0]
        inner = layer.feed
        layer.feed = lambda hidden, *rest: inner(hidden, *rest) * math.nan
        [output] = llm.generate([prompt_of(32)], greedy(1), methods=choice)
        llm.engine.check_integrity()
    assert output.error is not None and "logits are not finite" in output.error


def test_blocks_that_matter_alike_stay_in_their_order() -> None:
    method = SlimInfer(layers="2", keep="0.5", span=32, block=4, unit=2)
    alike = torch.full((2, 2, 4, 35), 0.25)
    for weights in (alike, alike * math.nan):
        for first in (True, False):
            chosen = method.choose(weights, method.left(1, 35), first).tolist()
            assert chosen == [*range(12), *range(28, 35)]


@pytest.mark.parametrize(
    "wrong", [lambda count: slice(0, count), lambda count: slice(-count - 1, None)]
)
def test_a_wrong_choice_names_the_method(
    expected: Expected, monkeypatch: pytest.MonkeyPatch, wrong: Callable[[int], slice]
) -> None:
    def choose(self: SlimInfer, weights: Tensor, count: int, first: bool) -> Tensor:
        return torch.arange(weights.shape[-1])[wrong(count)]

    monkeypatch.setattr(SlimInfer, "choose", choose)
    with load(expected.directory, methods=(METHOD,), **OPTIONS) as llm:
        [output] = llm.generate([prompt_of(32)], greedy(2))
    assert output.error is not None
    assert "slim-infer must choose 16 of 32 tokens" in output.error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("layers=3", "keep: give a share for each of the layers 3"),
        ("layers=4+2", "layers must be ascending, from 1 to 5 for this model, got 4, 2"),
        ("layers=0+2", "layers must be ascending, from 1 to 5 for this model, got 0, 2"),
        ("layers=2+6", "layers must be ascending, from 1 to 5 for this model, got 2, 6"),
        ("layers=a+b", "layers: give numbers"),
        ("layers=2.0+4", "layers: give shares of at most 1, or whole numbers; got 2.0"),
        ("layers=0.5+1e1", "layers: give shares of at most 1, or whole numbers; got 1e1"),
        ("layers=0.5+1.0", "layers must be ascending, from 1 to 5 for this model, got 3, 6"),
        ("keep=0.2+0.4", "keep: shares must descend"),
        ("keep=1.2+0.4", "keep: shares must descend"),
        ("keep=0.5+0", "keep: shares must descend"),
        ("block=6,unit=4", "block must be a multiple of unit"),
        ("span=100", "span must be a multiple of block"),
        ("span=64", "64 tokens of a prompt in one step, in which a sequence is sure of 33;"),
    ],
)
def test_options_that_do_not_fit(expected: Expected, options: str, message: str) -> None:
    method = f"{NAME}:{options}" if "span" in options else f"{NAME}:span=32,block=16,{options}"
    if "block=" in options:
        method = f"{NAME}:{options},span=24"
    with pytest.raises(ConfigurationError, match=message):
        load(expected.directory, methods=(method,), **OPTIONS)


@pytest.mark.parametrize("name", ["deepseek_v2", "gpt2", "qwen3_moe", "smollm3"])
def test_other_architectures(expectations: Callable[[str], Expected], name: str) -> None:
    """Latents, learned positions, experts, layers without positions: the same one token at a time
    as all together, and not what the model says of the whole prompt.
    """
    expected = expectations(name)
    layers = expected.model.config.num_hidden_layers
    method = f"{NAME}:layers={layers // 2},keep=0.3,span=32,block=4,unit=2"
    prompts = [prompt_of(length) for length in (75, 30)]
    found = []
    for reference in (False, True):
        options = {**OPTIONS, "reference": reference, "methods": (method,)}
        with load(expected.directory, **options) as llm:
            recorder = LogitsRecorder(llm)
            outputs = llm.generate(prompts, greedy(5))
            llm.engine.check_integrity()
        found.append([recorder.logits(output) for output in outputs])
    for output, fast, slow in zip(outputs, *found, strict=True):
        assert (fast - slow).abs().max() < TOLERANCE
        assert (fast - expected.sampled_logits(output)).abs().max() > 100 * TOLERANCE
