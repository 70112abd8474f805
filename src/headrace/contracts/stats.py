"""Counters and gauges of the engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. The first six are gauges, the others only grow.

    Args:
        waiting, running: sequences in the queue, and sequences that hold pages.
        pages_used: pages that some sequence holds.
        pages_cached: pages that no sequence holds but the prefix tree keeps.
        pages_total: pages of the arena.
        pages_peak: most pages that sequences have held in a step.
        prefix_query_tokens: prompt tokens looked up in the prefix tree.
        prefix_hit_tokens: of these, the ones whose pages were found.
        preemptions: sequences that lost their pages to others.
        prompt_tokens, generation_tokens: tokens of accepted prompts, and tokens sampled.
        steps: steps executed.
        aborted, failed: requests that ended so.
        drafts: times that tokens were guessed for a sequence.
        draft_tokens, accepted_tokens: tokens guessed, and of these the right ones.
    """

    waiting: int = 0
    running: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_total: int = 0
    pages_peak: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    aborted: int = 0
    failed: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
