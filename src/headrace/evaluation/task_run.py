"""A task is put to a model: problems become prompts, completions become scores."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from headrace.contracts.sampling import SamplingParams
from headrace.evaluation.task import Problem, Task
from headrace.llm import LLM, Prompt


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """So many problems of a level of a task.

    Args:
        agnostic: the context is in the cache, and has met the KV policy, before the question is
            seen; else both are read at once.
        samples: completions of each problem; greedy ones if ``temperature`` is 0.
    """

    task: Task
    level: str
    count: int
    agnostic: bool = False
    samples: int = 1
    temperature: float = 0.0

    @property
    def name(self) -> str:
        """In tables."""
        mode = ", question later" if self.agnostic else ""
        return f"{self.task.name} {self.level}{mode}"


@dataclass(slots=True)
class TaskResult:
    """What came of it.

    Args:
        scores: of each problem, the mean over its samples.
        completions: the samples of each problem.
        prompt_tokens, output_tokens: in all.
        skipped: why nothing was run; empty if it was.
        seconds: that the engine took.
    """

    scores: list[float] = field(default_factory=list)
    completions: list[list[str]] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    skipped: str = ""
    seconds: float = 0.0


def choose_problems(plan: TaskPlan, seed: int) -> list[Problem]:
    """Its problems: those of the test split that come first."""
    return list(islice(plan.task.problems("test", plan.level, seed), plan.count))


def prompt_of(llm: LLM, plan: TaskPlan, problem: Problem) -> Prompt:
    """A problem as a prompt."""
    if plan.task.chat:
        messages = [{"role": "user", "content": problem.context + problem.question}]
        ids = llm.tokenizer.encode_chat(messages, add_generation_prompt=True)
        return {"prompt_token_ids": ids}
    if plan.agnostic:
        return {"segments": [problem.context, problem.question]}
    return problem.context + problem.question


def sampling_of(plan: TaskPlan, number: int, seed: int) -> SamplingParams:
    """How the ``number``-th problem is completed."""
    return SamplingParams(
        n=plan.samples,
        max_tokens=plan.task.max_tokens(plan.level),
        temperature=plan.temperature,
        seed=seed * 1_000_003 + number,
        stop=plan.task.stop,
        include_stop_str_in_output=True,
    )


def run_task(llm: LLM, plan: TaskPlan, seed: int, sampling_seed: int = 0) -> TaskResult:
    """Run a plan through the engine, all problems at once; see ``score_problems``.

    Args:
        seed: of the problems; ``sampling_seed``: of the draws.
    """
    return score_problems(llm, plan, choose_problems(plan, seed), sampling_seed)


def score_problems(
    llm: LLM, plan: TaskPlan, problems: Sequence[Problem], sampling_seed: int = 0, first: int = 0
) -> TaskResult:
    """Put problems to the engine, all at once.

    Args:
        first: number of the first of them among the plan's; it decides what is drawn.

    Raises:
        RuntimeError: a request failed, or the engine counted other tokens than came out.
    """
    prompts = [prompt_of(llm, plan, problem) for problem in problems]
    params = [sampling_of(plan, first + i, sampling_seed) for i in range(len(problems))]
    lengths = [len(llm.tokenize(prompt)) for prompt in prompts]
    context = llm.model_info.max_model_len
    longest = max(lengths) + plan.task.max_tokens(plan.level)
    if longest > context:
        return TaskResult(skipped=f"needs {longest} tokens, the context holds {context}")
    before, started = llm.stats(), time.perf_counter()
    outputs = llm.generate(prompts, params)
    after, seconds = llm.stats(), time.perf_counter() - started
    failed = next((output.error for output in outputs if output.error), None)
    if failed is not None:
        raise RuntimeError(f"{plan.name}: {failed}")
    result = TaskResult(prompt_tokens=sum(lengths), seconds=seconds)
    for problem, output in zip(problems, outputs, strict=True):
        texts = [completion.text for completion in output.outputs]
        result.completions.append(texts)
        result.scores.append(_mean(plan.task.score(problem, text) for text in texts))
        result.output_tokens += sum(len(c.token_ids) for c in output.outputs)
    counted = (after.prompt_tokens - before.prompt_tokens) + (
        after.generation_tokens - before.generation_tokens
    )
    if counted != result.prompt_tokens + result.output_tokens:
        raise RuntimeError(
            f"{plan.name}: the engine counted {counted} tokens, and "
            f"{result.prompt_tokens + result.output_tokens} came out"
        )
    return result


def _mean(values: Iterable[float]) -> float:
    listed: Sequence[float] = list(values)
    return sum(listed) / len(listed)
