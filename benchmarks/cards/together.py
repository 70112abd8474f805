"""Methods by which sequences see each other."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from harness import progress

from cards.measuring import ON, Rows, Setup, alone, fresh_prompts, in_turn, timed_rows, trained
from cards.quality import Side, code_prompts
from headrace import SamplingParams
from headrace.evaluation.measured import Measurement

NAME = "hogwild-inference"
WORKERS = 4
HEADER = "\n\n# {number}\n"
ALTERNATIVES = 64


def layouts(setup: Setup) -> Rows:
    """How far workers are from a loop that makes the layout of every one of them explicitly."""
    model, label = trained("base")
    count, context, tokens = setup.of((4, 96, 16), (1, 32, 4))
    params = SamplingParams(
        n=WORKERS, max_tokens=tokens, seed=0, ignore_eos=True, logprobs=ALTERNATIVES
    )
    headers = [HEADER.replace("{number}", str(number + 1)) for number in range(WORKERS)]
    side, room = Side(NAME), context + WORKERS * (tokens + 16)
    with side.open(model, dtype="float32", max_model_len=room) as llm:
        prompts = code_prompts(llm, count, context)
        choice = {NAME: {"header": HEADER}}
        outputs = llm.generate(prompts, params, methods=choice, use_tqdm=False)
        begun = [llm.tokenizer.encode(header, False) for header in headers]
    slow = _slow_loop(model)
    farthest = 0.0
    for number, (ids, output) in enumerate(zip(prompts, outputs, strict=True)):
        progress(f"  the slow loop, prompt {number + 1} of {count}")
        found = slow.sampled_logits(ids, begun, [each.token_ids for each in output.outputs])
        for each, logits in zip(output.outputs, found, strict=True):
            assert each.logprobs is not None
            for entry, row in zip(each.logprobs, torch.log_softmax(logits, -1), strict=True):
                apart = (abs(own.logprob - float(row[token])) for token, own in entry.items())
                farthest = max(farthest, *apart)
    row = Measurement(
        "log-probabilities, farthest from a slow loop's, nats",
        farthest,
        f"{count} gangs of {WORKERS}, {tokens} tokens each",
        claim="works out of the box, without fine-tuning",
        model=f"{label}, fp32",
        options=side.options,
    )
    return {NAME: [row]}


def _slow_loop(model: Path) -> Any:
    """The reference of the tests."""
    import transformers

    root = str(Path(__file__).parents[2])
    if root not in sys.path:
        sys.path.append(root)
    shared_layout: Any = importlib.import_module("tests.models.shared_layout")
    auto_model: Any = transformers.AutoModelForCausalLM
    return shared_layout.SharedLayout(auto_model.from_pretrained(model, dtype=torch.float32).eval())


def speed(setup: Setup) -> Rows:
    """Workers beside as many sequences that do not see each other."""
    model, label = setup.packed()
    length, tokens = setup.of((512, 64), (32, 8))
    side = Side(NAME)
    params = SamplingParams(n=WORKERS, max_tokens=tokens, seed=0, ignore_eos=True, detokenize=False)
    with side.open(model, **alone(4096)) as llm:
        prompts = fresh_prompts(llm, 1, length)
        found = in_turn(llm, setup, {"plain": {}, ON: None}, prompts, params)
    about = {"model": label, "options": side.options}
    what = f"decoding of {WORKERS} behind {length} tokens, tokens/s"
    return {NAME: timed_rows(found, about, what=what)}
