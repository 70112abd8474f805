"""A process of ``two_installations``: a line in is a turn, a line out its seconds.

It takes nothing but what any version of Headrace has.
"""

from __future__ import annotations

import gc
import random
import sys
import time

from headrace import LLM, SamplingParams

ROWS, PROMPT, TOKENS = 16, 32, 96


def main() -> None:
    """Decode the same rows in every turn."""
    source = random.Random(0)
    prompts = [
        {"prompt_token_ids": [source.randrange(300, 3000) for _ in range(PROMPT)]}
        for _ in range(ROWS)
    ]
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, detokenize=False)
    llm = LLM(num_threads=int(sys.argv[1]))
    for _ in sys.stdin:
        gc.collect()
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
