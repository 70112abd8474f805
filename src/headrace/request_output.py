"""Assembles the updates of a request into the result that callers see."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from headrace.contracts.outputs import (
    CompletionOutput,
    Logprob,
    RequestOutput,
    SequenceUpdate,
    TokenLogprobs,
)
from headrace.contracts.sampling import SamplingParams

TokenText = Callable[[int], str]


class OutputBuilder:
    """Grows one ``RequestOutput``, which stays the same object from update to update."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        token_text: TokenText,
    ) -> None:
        self._token_text = token_text
        wanted = params.logprobs is not None
        completions = [
            CompletionOutput(
                index,
                logprobs=[] if wanted else None,
                cumulative_logprob=0.0 if wanted else None,
            )
            for index in range(params.n)
        ]
        self.output = RequestOutput(request_id, prompt, prompt_token_ids, completions)

    def apply(self, update: SequenceUpdate) -> None:
        """Add what a step produced."""
        completion = self.output.outputs[update.index]
        completion.token_ids += update.token_ids
        completion.text += update.text
        for entry in update.logprobs or ():
            assert completion.logprobs is not None and completion.cumulative_logprob is not None
            completion.logprobs.append(self._logprobs(entry))
            completion.cumulative_logprob += entry.logprob
        if update.finish_reason is not None:
            completion.finish_reason = update.finish_reason
            completion.stop_reason = update.stop_reason
            self.output.error = self.output.error or update.error
        if update.prompt_logprobs is not None:
            self.output.prompt_logprobs = [
                None if entry is None else self._logprobs(entry) for entry in update.prompt_logprobs
            ]
        if update.embedding is not None:
            self.output.embedding = update.embedding
        if update.request_finished:
            self.output.finished = True
            self.output.metrics = update.metrics

    def _logprobs(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        """The token itself first, then the alternatives, by rank."""
        ranked: Iterable[tuple[int, float]] = entry.top
        found = {entry.token_id: self._entry(entry.token_id, entry.logprob, entry.rank)}
        for rank, (token, logprob) in enumerate(ranked, start=1):
            found.setdefault(token, self._entry(token, logprob, rank))
        return found

    def _entry(self, token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, self._token_text(token))
