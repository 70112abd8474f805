"""Gangs in the engine: what their sequences see of each other, and the room that they need."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from headrace.contracts.cache import CacheLayout
from headrace.contracts.gang import GangMethod
from headrace.contracts.step import Segment

if TYPE_CHECKING:
    from headrace.engine.sequence import Sequence


class Gang:
    """The sequences of a request that see each other's blocks; see ``GangMethod``.

    It is scheduled as its leader, the first of them: it waits, runs and is preempted as one, with
    a table row for each member. The leader computes the prompt; then the members part, each with
    a block of its own behind the prompt's pages, and feed one token each in every step. A member
    that has ended keeps its pages, for the others to see, until all have; it feeds its tokens
    again if the gang is preempted.

    Invariant: of two members with pending tokens, both have fed as many of their blocks.
    """

    __slots__ = ("_seen", "members")

    def __init__(self, members: list[Sequence], method: GangMethod) -> None:
        self.members = members
        count = len(members)
        self._seen = [tuple(method.seen_blocks(viewer, count)) for viewer in range(count)]

    @property
    def leader(self) -> Sequence:
        """The member that stands for all."""
        return self.members[0]

    @property
    def can_part(self) -> bool:
        """Whether the prompt is in the cache, and the members have no blocks of their own yet."""
        prompt = len(self.leader.request.prompt_token_ids)
        return self.leader.begin == 0 and self.leader.num_fed == prompt

    def num_columns(self, layout: CacheLayout) -> int:
        """Pages of each cache group that hold all known tokens, and let each member feed one."""
        request = self.leader.request
        prompt, least = len(request.prompt_token_ids), int(request.max_tokens > 1)
        blocks = (
            layout.pages_for(max(len(each.token_ids) - prompt, least)) for each in self.members
        )
        return layout.pages_for(prompt) + sum(blocks)

    def segments(self, viewer: Sequence) -> list[Segment]:
        """What a member sees before its own block: the prompt, then others' blocks.

        All have their keys at positions that follow the prompt's, as if it were alone. What lies
        between a segment and the viewer's block takes it so much farther away.
        """
        found: list[Segment] = []
        shift = 0
        for index in reversed(self._seen[viewer.index]):
            other = self.members[index]
            length = other.num_slots - other.begin
            if length:
                shift += length
                found.append(Segment(other.table_row, other.begin, length, shift))
        prompt = len(viewer.request.prompt_token_ids)
        found.append(Segment(self.leader.table_row, 0, prompt, shift))
        return found[::-1]


def most_gang_tokens(
    prompt: int,
    headers: SequenceOf[int],
    context: int,
    layout: CacheLayout,
    num_pages: int,
    columns: int,
) -> int:
    """Tokens that each member of a gang may generate at most, when nothing else runs.

    Args:
        prompt: its tokens; headers: those of each member's header.
        context: tokens of all together at most, as each sees them in one row.
        num_pages: of the arena; columns: pages of one group that a table row has room for.
    """

    def fits(tokens: int) -> bool:
        blocks = [layout.pages_for(header + tokens - 1) for header in headers]
        shared = layout.pages_for(prompt)
        pages = (shared + sum(blocks)) * len(layout.groups)
        in_context = prompt + sum(headers) + tokens * len(headers) <= context
        return in_context and pages <= num_pages and shared + max(blocks) <= columns

    return bisect_left(range(1, context + 1), True, key=lambda tokens: not fits(tokens))
