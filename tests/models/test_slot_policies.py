"""Slots are really gone, of every head others: logits are those of transformers without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headrace import SamplingParams
from headrace.contracts.slot_policy import CompactionSchedule, SlotPolicy
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.exec.layer_loop import LayerContext
from headrace.kv.policies.h2o import HeavyHitterOracle
from headrace.kv.policies.scissorhands import Scissorhands
from tests.models.expected import (
    TOLERANCE,
    Expected,
    full_prompt_logprobs,
    greedy,
    load,
    prompt_of,
)
from tests.support.checkpoints import VOCAB
from tests.support.logits import LogitsRecorder

BLOCK = 4
SCISSORHANDS = Scissorhands(budget=16, drop=0.5, history=5, recent=4)
KV = "scissorhands:budget=16,drop=0.5,history=5,recent=4"
POLICIES = {KV: SCISSORHANDS, "h2o:budget=12,drop=0.5": HeavyHitterOracle(12, 0.5)}


@pytest.fixture(params=("llama3", "qwen3"))
def expected(request: pytest.FixtureRequest, expectations: Callable[[str], Expected]) -> Expected:
    """Two configurations, both with fewer KV heads than query heads."""
    return expectations(request.param)


@contextmanager
def masked(expected: Expected, masks: list[Tensor]) -> Iterator[Any]:
    """The model, each layer and head of which sees only what its mask ``[heads, T, T]`` says."""

    def show(mask: Tensor) -> Any:
        addend = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": addend[None]}

        return hook

    model = expected.model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    handles = [
        layer.self_attn.register_forward_pre_hook(show(mask), with_kwargs=True)
        for layer, mask in zip(model.model.layers, masks, strict=True)
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)


def reduced_logits(
    expected: Expected, tokens: list[int], policy: SlotPolicy = SCISSORHANDS
) -> Tensor:
    """``[T, vocab]``: at each compaction, what the attention of a whole forward pass decides."""
    config, schedule = expected.model.config, policy.schedule(BLOCK)
    layers, heads, length = config.num_hidden_layers, config.num_attention_heads, len(tokens)
    ratio = heads // config.num_key_value_heads
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    masks = [causal.repeat(heads, 1, 1) for _ in range(layers)]
    held = [[list[int]() for _ in range(heads // ratio)] for _ in range(layers)]
    notes = [[torch.zeros(1, 0) for _ in range(heads // ratio)] for _ in range(layers)]
    ids, start = torch.tensor([tokens]), 0
    with torch.inference_mode():
        while (due := schedule.next_due(start)) <= length:
            with masked(expected, [mask[:, :due, :due] for mask in masks]) as model:
                seen = model(ids[:, :due], output_attentions=True).attentions
            begin = max(start, due - schedule.window)
            for layer in range(layers):
                rows = seen[layer][0, :, begin:].unflatten(0, (-1, ratio))
                for head, slots in enumerate(held[layer]):
                    slots += range(start, due)
                    known = torch.zeros(1, len(slots))
                    known[:, : notes[layer][head].shape[1]] = notes[layer][head]
                    past = len(slots) - (due - begin)
                    weights = rows[head : head + 1, :, :, slots].mean(dim=1)
                    policy.observe(known, weights, past)
                    order = policy.rank(known)[0].topk(schedule.budget).indices.sort().values
                    notes[layer][head] = policy.carry(known[:, order])
                    kept = [slots[i] for i in order.tolist()]
                    gone = sorted({*slots} - {*kept})
                    masks[layer][head * ratio : (head + 1) * ratio, due:, gone] = False
                    held[layer][head] = kept
            start = due
        with masked(expected, masks) as model:
            logits: Tensor = model(ids).logits[0].float()
    if policy == SCISSORHANDS:
        assert not all(torch.equal(head, masks[0][0]) for mask in masks for head in mask)
    return logits


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize(
    "options",
    [{}, {"reference": True}, {"max_num_batched_tokens": 7}],
    ids=["fast", "reference", "chunks"],
)
def test_logits_without_what_was_dropped(
    expected: Expected, options: dict[str, Any], kv: str
) -> None:
    prompt, schedule = prompt_of(61), POLICIES[kv].schedule(BLOCK)
    params = SamplingParams(max_tokens=0, prompt_logprobs=VOCAB)
    with load(expected.directory, **options, block_size=BLOCK, kv=kv) as llm:
        [output] = llm.generate([prompt], params)
        assert llm.stats().pages_peak * BLOCK <= schedule.most_slots(61)
    found = full_prompt_logprobs(output)
    wanted = torch.log_softmax(reduced_logits(expected, prompt, POLICIES[kv]), -1)[:-1]
    assert (found - wanted).abs().max() < TOLERANCE
    whole = torch.log_softmax(expected.logits(prompt), -1)[:-1]
    assert (found[schedule.first :] - whole[schedule.first :]).abs().max() > 0.01


def test_generation_beside_plain_requests(expected: Expected) -> None:
    """Prompts, generation, forks and plain rows share steps."""
    prompts = [prompt_of(length) for length in (9, 22, 40, 24)]
    choices: list[Any] = [None, {}, None, None]
    params = [greedy(30), greedy(30), greedy(30), greedy(20, n=2)]
    options: dict[str, Any] = {"block_size": BLOCK, "max_num_batched_tokens": 16}
    with load(expected.directory, kv=KV, **options) as llm:
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(prompts, params, methods=choices)
        llm.engine.check_integrity()
    for output, choice in zip(outputs, choices, strict=True):
        for index, completion in enumerate(output.outputs):
            tokens = [*output.prompt_token_ids, *completion.token_ids]
            logits = reduced_logits(expected, tokens) if choice is None else expected.logits(tokens)
            wanted = logits[len(output.prompt_token_ids) - 1 : -1]
            assert (recorder.logits(output, index) - wanted).abs().max() < TOLERANCE


def test_compacted_prefixes_are_found_again(expected: Expected) -> None:
    prompt = prompt_of(50)
    with load(expected.directory, block_size=BLOCK, kv=KV) as llm:
        cold, longer, warm, plain = (
            llm.generate([tokens], greedy(6, logprobs=0), methods=choice)[0]
            for tokens, choice in (
                (prompt, None),
                ([*prompt, *prompt_of(7)], None),
                (prompt, None),
                (prompt, {}),
            )
        )
        llm.engine.check_integrity()
    cached = [out.metrics.num_cached_tokens for out in (cold, longer, warm, plain) if out.metrics]
    # The last compaction before the prompt's end is at 48.
    assert cached == [0, 48, 48, 0]
    assert warm.outputs[0].token_ids == cold.outputs[0].token_ids
    for output in (longer, warm):
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        wanted = torch.log_softmax(reduced_logits(expected, tokens), -1)
        logprobs = output.outputs[0].logprobs
        assert logprobs is not None
        for place, entry in enumerate(logprobs, len(output.prompt_token_ids) - 1):
            [(token, found)] = entry.items()
            assert abs(found.logprob - wanted[place, token]) < TOLERANCE


@pytest.mark.parametrize("kv", POLICIES)
def test_preempted_sequences_come_out_the_same(expected: Expected, kv: str) -> None:
    prompts = [prompt_of(40, seed) for seed in range(4)]
    with load(expected.directory, block_size=BLOCK, kv=kv) as llm:
        alone = [llm.generate([prompt], greedy(30))[0] for prompt in prompts]
    memory = expected.cache_bytes(90)
    with load(expected.directory, block_size=BLOCK, kv=kv, kv_cache_memory_bytes=memory) as llm:
        together = llm.generate(prompts, greedy(30))
        assert llm.stats().preemptions > 0
        assert llm.stats().pages_used == 0
        llm.engine.check_integrity()
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


def test_more_sequences_fit(expected: Expected) -> None:
    """At a fifth of the slots, memory that held one sequence holds four."""
    memory = expected.cache_bytes(160)
    prompts = [prompt_of(150, seed) for seed in range(4)]
    for kv, most in (("full", 1), (KV, 4)):
        with load(
            expected.directory,
            block_size=BLOCK,
            kv=kv,
            kv_cache_memory_bytes=memory,
            enable_prefix_caching=False,
        ) as llm:
            running = []
            submit = llm.engine.runner.submit

            def counted(plan: Any, tables: Any, submit: Any = submit, seen: Any = running) -> Any:
                seen.append(len(plan.rows))
                return submit(plan, tables)

            llm.engine.runner.submit = counted  # type: ignore[method-assign]
            llm.generate(prompts, greedy(6))
        assert max(running) == most


def test_too_little_memory_is_refused_at_admission(expected: Expected) -> None:
    memory = expected.cache_bytes(64)
    kv = "scissorhands:budget=32,drop=0.5,history=5,recent=4"
    with load(expected.directory, block_size=BLOCK, kv=kv, kv_cache_memory_bytes=memory) as llm:
        with pytest.raises(InvalidRequestError, match=r"methods: .* lower the budget"):
            llm.generate([prompt_of(50)], greedy(4))
        assert llm.generate([prompt_of(40)], greedy(4))[0].error is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("budget=16,recent=16", "recent must be below the budget of 16, got 16"),
        ("budget=64,history=40", "history must be between 1 and budget x drop, 32, got 40"),
        ("drop=0", "drop must be above 0"),
    ],
)
def test_options_out_of_range(expected: Expected, options: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(expected.directory, kv=f"scissorhands:{options}")


@pytest.mark.parametrize("kv", POLICIES)
def test_sums_of_attention_say_what_probabilities_say(
    expected: Expected, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, of chunks and single tokens, with a plain row before them."""
    observe, seen = LayerContext._observe, []

    def both(context: LayerContext, layer: int, *arguments: Any) -> None:
        *others, sums = arguments
        assert context._statistics is not None
        known = context._statistics._layers[layer]
        before = known.clone()
        observe(context, layer, *others, sums)
        if sums is None:
            return
        by_sums = known.clone()
        known.copy_(before)
        observe(context, layer, *others, None)
        torch.testing.assert_close(by_sums, known, rtol=1e-2, atol=1e-2)
        seen.append((len(context.rows.lengths), max(context.rows.lengths)))

    monkeypatch.setattr(LayerContext, "_observe", both)
    prompts = [prompt_of(length, length) for length in (5, 30, 44)]
    with load(expected.directory, dtype="bfloat16", block_size=BLOCK, kv=kv) as llm:
        llm.generate(prompts, greedy(20), methods=[{}, None, None])
    assert (3, 1) in seen, "of single tokens, among others' rows"
    assert any(queries > 1 for _, queries in seen) == POLICIES[kv].adds_up


@given(
    blocks=st.integers(1, 6),
    per_interval=st.integers(1, 5),
    window=st.integers(1, 5),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=60),
)
def test_schedules(blocks: int, per_interval: int, window: int, chunks: list[int]) -> None:
    """Slots are what the schedule says, whatever the chunks, and never more than its bound."""
    schedule = CompactionSchedule(blocks * 4, per_interval * 4, min(window, per_interval * 4))
    fed = slots = 0
    compacted = []
    for chunk in chunks:
        end = min(fed + chunk, schedule.next_stop(fed))
        assert end > fed
        assert all(schedule.observes(i) == schedule.observes(fed) for i in range(fed, end))
        slots, fed = slots + end - fed, end
        assert slots <= max(schedule.first, schedule.budget + schedule.interval)
        if schedule.is_due(fed):
            assert slots > schedule.budget
            slots = schedule.budget
            compacted.append(fed)
        assert slots == schedule.slots(fed) <= schedule.most_slots(fed)
    assert compacted == [i for i in range(fed + 1) if i and schedule.is_due(i)]
