"""What a gang's rows have to read, worked out from tokens alone: no pages, no schedule."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import ClassVar

from headrace.contracts.gang import GangMethod, gang_method
from headrace.contracts.method import MethodCard
from headrace.contracts.step import Segment
from headrace.engine.sequence import Sequence, Status


@dataclass(frozen=True, slots=True)
class SeesPrevious(GangMethod):
    """A sequence sees the one before it; the first sees the prompt alone."""

    card: ClassVar[MethodCard] = MethodCard(
        "",
        "",
        "lossy",
    )

    def seen_blocks(self, viewer: int, count: int) -> SequenceOf[int]:
        return [viewer - 1] if viewer else []


def block_histories(
    start: int, blocks: SequenceOf[SequenceOf[int]], method: GangMethod
) -> list[list[int]]:
    """Of each member, the history after each token of its block.

    Token t follows from the token before it, and from what others have before token t.

    Args:
        start: the history after the prompt.
        blocks: all tokens that members have fed, or will feed as far as is known.
    """
    found: list[list[int]] = [[] for _ in blocks]
    for step in range(max(map(len, blocks))):
        ends = [known[-1] if known else start for known in found]
        for viewer, block in enumerate(blocks):
            if step < len(block):
                seen = method.seen_blocks(viewer, len(blocks))
                views = tuple(ends[other] for other in seen)
                found[viewer].append(hash((ends[viewer], block[step], views)))
    return found


@dataclass(frozen=True)
class Part:
    """A segment that a row has to read: whose, where it lies, and which of its tokens.

    ``tokens`` are counted from the beginning of the owner's text, headers included.
    """

    owner: Sequence
    segment: Segment
    tokens: range


def expected_parts(viewer: Sequence, block_size: int) -> list[Part]:
    """What the member's next row sees before its own block, in the order in which it sees it."""
    request = viewer.request
    members = request.sequences
    method = gang_method(request.profile.methods, len(members))
    assert method is not None
    prompt = len(request.prompt_token_ids)
    begin = -(-prompt // block_size) * block_size
    fed = viewer.num_fed - prompt
    layout: list[tuple[Sequence, int, range]] = [(members[0], 0, range(prompt))]
    for index in method.seen_blocks(viewer.index, len(members)):
        other = members[index]
        length = min(fed, len(other.token_ids) - prompt)
        if length:
            layout.append((other, begin, range(prompt, prompt + length)))
    place = sum(len(tokens) for *_, tokens in layout) + fed
    parts, start = [], 0
    for owner, first, tokens in layout:
        # The input's distance to the first key is that of the layout.
        turned_to = place - start + tokens.start
        segment = Segment(owner.table_row, first, len(tokens), turned_to - (prompt + fed))
        parts.append(Part(owner, segment, tokens))
        start += len(tokens)
    return parts


def known_blocks(members: SequenceOf[Sequence]) -> list[list[int]]:
    """The members' tokens behind the prompt that they have fed or will feed."""
    return [each.token_ids[len(each.request.prompt_token_ids) :] for each in members]


def expected_tokens(sequence: Sequence, beginnings: SequenceOf[SequenceOf[int]]) -> list[int]:
    """What the engine has to know of a sequence: of one that has ended, what it has fed."""
    request = sequence.request
    begun = beginnings[sequence.index] if beginnings else ()
    known = [*request.prompt_token_ids, *begun, *sequence.state.output_token_ids]
    return known[:-1] if sequence.status is Status.FINISHED else known


def fits(
    prompt: int,
    headers: SequenceOf[int],
    tokens: int,
    *,
    context: int,
    block_size: int,
    pages: int,
    groups: int,
) -> bool:
    """Whether a gang of which each member generates so many tokens has room when alone."""
    blocks = [-(-(header + tokens - 1) // block_size) for header in headers]
    shared = -(-prompt // block_size)
    if prompt + sum(headers) + len(headers) * tokens > context:
        return False
    longest = -(-context // block_size)
    return groups * (shared + sum(blocks)) <= pages and shared + max(blocks) <= longest
