"""``LLM``: prompts in, results out, on the embedded model."""

from __future__ import annotations

from typing import Any

import pytest

from headrace import LLM, SamplingParams
from headrace.contracts.outputs import RequestOutput
from tests.llm.conftest import MakeLLM

TEXT = "def fibonacci(n):\n    return"
OTHERS = (
    "import os\n",
    "class Point:\n    def __init__(self, x, y):\n",
    "# A list of names\nnames = [",
)


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **options})


def tokens(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


# -- prompts and results --------------------------------------------------------------------


def test_every_form_of_a_prompt_means_the_same(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)
    forms: list[Any] = [
        TEXT,
        [TEXT],
        ids,
        tuple(ids),
        [ids],
        {"prompt": TEXT},
        {"prompt_token_ids": ids},
        [{"prompt_token_ids": ids}],
    ]
    results = [llm.generate(form, greedy()) for form in forms]
    assert all(len(result) == 1 for result in results)
    assert all(result[0].prompt_token_ids == ids for result in results)
    assert all(tokens(result[0]) == tokens(results[0][0]) for result in results)
    assert [result[0].prompt for result in results] == [
        TEXT, TEXT, None, None, None, TEXT, None, None,
    ]  # fmt: skip


def test_forms_of_prompts_mix_in_one_call(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)
    results = llm.generate([TEXT, ids, {"prompt": TEXT}], greedy())
    assert len({tuple(tokens(result)[0]) for result in results}) == 1


def test_no_prompts_give_no_results(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_a_result_is_complete(llm: LLM) -> None:
    (result,) = llm.generate(TEXT, greedy())
    (completion,) = result.outputs
    assert result.finished and completion.finished()
    assert result.error is None and result.prompt_logprobs is None
    assert (completion.index, completion.finish_reason) == (0, "length")
    assert len(completion.token_ids) == 6
    assert completion.text == llm.tokenizer.decode(completion.token_ids)
    assert completion.logprobs is None and completion.cumulative_logprob is None
    metrics = result.metrics
    assert metrics is not None
    times = (
        metrics.arrival_time,
        metrics.first_scheduled_time,
        metrics.first_token_time,
        metrics.finished_time,
    )
    assert list(times) == sorted(times)  # type: ignore[type-var]


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [TEXT, *OTHERS] * 3
    lengths = [9, 1, 5, 2, 0, 7, 3, 8, 4, 1, 6, 2]
    results = llm.generate(prompts, [greedy(max_tokens=length) for length in lengths])
    assert [result.prompt for result in results] == prompts
    assert [len(tokens(result)[0]) for result in results] == lengths


def test_more_prompts_than_the_queue_holds(make_llm: MakeLLM) -> None:
    llm = make_llm(max_num_waiting=1, max_num_seqs=2)
    prompts = [[100 + i] for i in range(9)]
    results = llm.generate(prompts, greedy(max_tokens=3))
    assert [result.prompt_token_ids for result in results] == prompts
    assert all(len(tokens(result)[0]) == 3 for result in results)


def test_a_batch_changes_nothing(llm: LLM) -> None:
    prompts = [TEXT, *OTHERS]
    together = llm.generate(prompts, greedy())
    assert [tokens(result) for result in together] == [
        tokens(llm.generate(prompt, greedy())[0]) for prompt in prompts
    ]


def test_progress_is_shown_on_demand(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate([TEXT, *OTHERS], greedy(max_tokens=1), use_tqdm=False)
    assert capsys.readouterr() == ("", "")
    llm.generate([TEXT, *OTHERS], greedy(max_tokens=1), use_tqdm=True)
    shown = capsys.readouterr()
    assert "4/4" in shown.err and shown.out == ""


def test_defaults_come_from_the_model_and_can_be_changed(llm: LLM) -> None:
    assert llm.default_sampling_params(max_tokens=3, top_k=7) == SamplingParams(
        **{**llm._defaults, "max_tokens": 3, "top_k": 7}
    )
    assert len(tokens(llm.generate(TEXT)[0])[0]) <= SamplingParams().max_tokens  # type: ignore[operator]


def test_chat_is_the_template_and_then_generate(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    (answer,) = llm.chat(messages, greedy())
    ids = llm.tokenizer.encode(
        llm.tokenizer.apply_chat_template(messages), add_special_tokens=False
    )
    assert answer.prompt_token_ids == ids
    assert tokens(answer) == tokens(llm.generate(ids, greedy())[0])
    several = llm.chat([messages, messages], greedy())
    assert [tokens(each) for each in several] == [tokens(answer)] * 2


def test_counters_grow_with_the_work(make_llm: MakeLLM) -> None:
    llm = make_llm()
    before = llm.stats()
    llm.generate([[5, 6, 7], [8, 9]], greedy(max_tokens=4, ignore_eos=True))
    after = llm.stats()
    assert (before.prompt_tokens, before.generation_tokens, before.steps) == (0, 0, 0)
    assert (after.prompt_tokens, after.generation_tokens, after.steps) == (5, 8, 4)
    assert after.pages_total == llm.model_info.num_pages == before.pages_total


# -- completions ----------------------------------------------------------------------------


def test_several_completions_differ_when_sampled_and_agree_when_greedy(llm: LLM) -> None:
    (sampled,) = llm.generate(TEXT, SamplingParams(n=4, max_tokens=12, seed=1, temperature=1.5))
    assert [completion.index for completion in sampled.outputs] == [0, 1, 2, 3]
    assert len({tuple(ids) for ids in tokens(sampled)}) == 4
    (same,) = llm.generate(TEXT, greedy(n=3))
    assert len({tuple(ids) for ids in tokens(same)}) == 1
    assert tokens(same)[0] == tokens(llm.generate(TEXT, greedy())[0])[0]


def test_completions_share_the_pages_of_the_prompt(make_llm: MakeLLM) -> None:
    llm = make_llm(enable_prefix_caching=False, block_size=4)
    llm.engine.add_request("r", list(range(64, 104)), greedy(n=4, max_tokens=2, ignore_eos=True))
    llm.engine.step()
    assert llm.stats().pages_used == 10
    llm.engine.abort_request("r")
    llm.engine.step()


def test_more_completions_than_rows(make_llm: MakeLLM) -> None:
    params = SamplingParams(n=5, max_tokens=5, seed=3, ignore_eos=True)
    (narrow,) = make_llm(max_num_seqs=2).generate(TEXT, params)
    (wide,) = make_llm().generate(TEXT, params)
    assert tokens(narrow) == tokens(wide)
    assert [len(ids) for ids in tokens(narrow)] == [5] * 5


def test_a_seed_reproduces_alone_and_in_a_batch(make_llm: MakeLLM) -> None:
    llm, other = make_llm(), make_llm(seed=99)
    params = SamplingParams(seed=42, max_tokens=10, temperature=1.2, n=2)
    (alone,) = llm.generate(TEXT, params)
    noise = SamplingParams(max_tokens=8, temperature=1.2)
    batch = llm.generate([*OTHERS, TEXT, *OTHERS], [noise] * 3 + [params] + [noise] * 3)
    (elsewhere,) = other.generate(TEXT, params)
    assert tokens(alone) == tokens(batch[3]) == tokens(elsewhere)
    (different,) = llm.generate(TEXT, SamplingParams(seed=43, max_tokens=10, temperature=1.2, n=2))
    assert tokens(different) != tokens(alone)


def test_without_a_seed_the_engines_own_decides(make_llm: MakeLLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5)
    engines = [make_llm(seed=1), make_llm(seed=1), make_llm(seed=2), make_llm(seed=None)]
    first = [[tokens(llm.generate(TEXT, params)[0]) for _ in range(2)] for llm in engines]
    assert first[0] == first[1]
    assert first[0][0] != first[0][1], "requests of one engine differ"
    assert len({str(each) for each in first}) == 3


# -- log-probabilities ----------------------------------------------------------------------


def test_logprobs_hold_the_token_and_the_best_alternatives(llm: LLM) -> None:
    (result,) = llm.generate(TEXT, SamplingParams(max_tokens=8, seed=5, temperature=2, logprobs=3))
    (completion,) = result.outputs
    assert completion.logprobs is not None and len(completion.logprobs) == 8
    total = 0.0
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        own = entries[token]
        total += own.logprob
        assert next(iter(entries)) == token
        assert own.decoded_token == llm.tokenizer.token_text(token)
        best = sorted(entries.values(), key=lambda entry: entry.rank)[:3]
        assert [entry.rank for entry in best] == [1, 2, 3]
        assert [e.logprob for e in best] == sorted((e.logprob for e in best), reverse=True)
        assert len(entries) == (3 if own.rank <= 3 else 4)
        assert all(entry.logprob <= 0 for entry in entries.values())
    assert completion.cumulative_logprob == pytest.approx(total)


def test_zero_logprobs_report_the_token_alone(llm: LLM) -> None:
    (result,) = llm.generate(TEXT, greedy(logprobs=0))
    (completion,) = result.outputs
    assert completion.logprobs is not None
    assert [list(entries) for entries in completion.logprobs] == [
        [token] for token in completion.token_ids
    ]


def test_a_greedy_token_has_rank_one(llm: LLM) -> None:
    (result,) = llm.generate(TEXT, greedy(logprobs=1))
    (completion,) = result.outputs
    assert completion.logprobs is not None
    for token, entries in zip(completion.token_ids, completion.logprobs, strict=True):
        assert entries[token].rank == 1 and len(entries) == 1


def test_scoring_a_text_gives_what_generating_it_gave(llm: LLM) -> None:
    """``echo`` with ``logprobs``: nothing is generated, the prompt is scored."""
    (made,) = llm.generate(TEXT, greedy(max_tokens=20, logprobs=2, ignore_eos=True))
    whole = made.prompt_token_ids + made.outputs[0].token_ids
    (scored,) = llm.generate(whole, greedy(max_tokens=0, prompt_logprobs=2))
    assert tokens(scored) == [[]] and scored.outputs[0].finish_reason == "length"
    assert scored.prompt_logprobs is not None and len(scored.prompt_logprobs) == len(whole)
    assert scored.prompt_logprobs[0] is None
    assert scored.prompt_logprobs[-20:] == made.outputs[0].logprobs


def test_prompt_scores_do_not_depend_on_chunks_or_the_cache(make_llm: MakeLLM) -> None:
    params = greedy(max_tokens=2, prompt_logprobs=1)
    prompt = list(range(64, 114))
    whole, chunked = make_llm(), make_llm(max_num_batched_tokens=7, block_size=4)
    (expected,) = whole.generate(prompt, params)
    for _ in range(2):
        (got,) = chunked.generate(prompt, params)
        assert got.prompt_logprobs == expected.prompt_logprobs
        assert tokens(got) == tokens(expected)


# -- what changes the choice of tokens ------------------------------------------------------


def test_logit_bias_forces_and_forbids(llm: LLM) -> None:
    (forced,) = llm.generate(TEXT, greedy(logit_bias={777: 100.0}))
    assert tokens(forced) == [[777] * 6]
    (plain,) = llm.generate(TEXT, greedy())
    first = tokens(plain)[0][0]
    (forbidden,) = llm.generate(TEXT, greedy(logit_bias={first: -100.0}))
    assert tokens(forbidden)[0][0] != first


def test_end_of_sequence_and_who_ignores_it(llm: LLM) -> None:
    eos = llm.model_info.eos_token_ids[0]
    bias = {eos: 100.0}
    (ended,) = llm.generate(TEXT, greedy(logit_bias=bias))
    assert tokens(ended) == [[eos]]
    assert (ended.outputs[0].finish_reason, ended.outputs[0].stop_reason) == ("stop", None)
    assert ended.outputs[0].text == ""
    (ignored,) = llm.generate(TEXT, greedy(logit_bias=bias, ignore_eos=True))
    assert tokens(ignored) == [[eos] * 6]
    assert ignored.outputs[0].finish_reason == "length"


def test_min_tokens_puts_the_end_off(llm: LLM) -> None:
    eos = llm.model_info.eos_token_ids[0]
    (result,) = llm.generate(TEXT, greedy(logit_bias={eos: 100.0}, min_tokens=4))
    (ids,) = tokens(result)
    assert len(ids) == 5 and ids[-1] == eos and eos not in ids[:-1]
    (stopped,) = llm.generate(
        TEXT, greedy(logit_bias={777: 100.0}, stop_token_ids=[777], min_tokens=2)
    )
    (ids,) = tokens(stopped)
    assert len(ids) == 3 and ids[-1] == 777 and 777 not in ids[:-1]


def test_stop_token_ids_end(llm: LLM) -> None:
    (result,) = llm.generate(TEXT, greedy(logit_bias={777: 100.0}, stop_token_ids=[776, 777]))
    (completion,) = result.outputs
    assert completion.token_ids == [777]
    assert (completion.finish_reason, completion.stop_reason, completion.text) == ("stop", 777, "")


def test_stop_strings_end_and_are_left_out(llm: LLM) -> None:
    (whole,) = llm.generate(TEXT, greedy(max_tokens=24, ignore_eos=True))
    text = whole.outputs[0].text
    stop = text[5:8]
    cut = text.index(stop)
    (stopped,) = llm.generate(
        TEXT, greedy(max_tokens=24, ignore_eos=True, stop=["never there", stop])
    )
    (completion,) = stopped.outputs
    assert completion.text == text[:cut]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) < 24
    (included,) = llm.generate(
        TEXT,
        greedy(max_tokens=24, ignore_eos=True, stop=stop, include_stop_str_in_output=True),
    )
    assert included.outputs[0].text == text[: cut + len(stop)]


def test_no_tokens_asked(llm: LLM) -> None:
    (result,) = llm.generate(TEXT, greedy(max_tokens=0, n=2))
    assert tokens(result) == [[], []]
    assert [c.finish_reason for c in result.outputs] == ["length", "length"]
    assert result.finished


def test_without_a_limit_the_context_is_filled(make_llm: MakeLLM) -> None:
    llm = make_llm(max_model_len=32)
    (result,) = llm.generate([70] * 20, greedy(max_tokens=None, ignore_eos=True))
    assert len(tokens(result)[0]) == 12
    assert result.outputs[0].finish_reason == "length"


def test_text_can_be_switched_off(llm: LLM) -> None:
    (result,) = llm.generate(TEXT, greedy(detokenize=False))
    assert result.outputs[0].text == "" and len(tokens(result)[0]) == 6


# -- the cache ------------------------------------------------------------------------------


def test_a_second_request_finds_the_prefix_of_the_first(make_llm: MakeLLM) -> None:
    llm = make_llm()
    prompt = list(range(64, 114))
    (first,) = llm.generate(prompt, greedy())
    (second,) = llm.generate(prompt, greedy())
    assert first.metrics is not None and first.metrics.num_cached_tokens == 0
    assert second.metrics is not None and second.metrics.num_cached_tokens == 48
    assert tokens(first) == tokens(second)
    stats = llm.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (100, 48)


def test_preemption_loses_and_repeats_no_token(make_llm: MakeLLM) -> None:
    ample = make_llm()
    scarce = make_llm(
        kv_cache_memory_bytes=14 * 4 * ample.model_info.kv_token_bytes,
        block_size=4,
        max_model_len=40,
    )
    prompts = [list(range(64 + i, 74 + i)) for i in range(5)]
    params = SamplingParams(
        max_tokens=12, seed=1, ignore_eos=True, logprobs=1, prompt_logprobs=1, n=2
    )
    expected, got = ample.generate(prompts, params), scarce.generate(prompts, params)
    assert scarce.stats().preemptions > 0 == ample.stats().preemptions
    for one, other in zip(expected, got, strict=True):
        assert one.outputs == other.outputs
        assert one.prompt_logprobs == other.prompt_logprobs
