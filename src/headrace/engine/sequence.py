"""A request and its sequences, as the engine sees them."""

from __future__ import annotations

import sys
from enum import Enum

import numpy as np
import numpy.typing as npt

from headrace.contracts.drafting import DraftMethod
from headrace.contracts.kv_codec import CodedUnit
from headrace.contracts.kv_policy import KVPolicy
from headrace.contracts.method import of_kind
from headrace.contracts.outputs import RequestMetrics, TokenLogprobs
from headrace.contracts.profile import Profile
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.slot_policy import CompactionSchedule, SlotPolicy
from headrace.contracts.step import Pooling, SampleState
from headrace.contracts.text import TextStream
from headrace.contracts.token_pruning import StageSlots, TokenPruningMethod
from headrace.engine.draft_gain import DraftGain
from headrace.engine.gang import Gang
from headrace.engine.prefix_tree import SealedRun
from headrace.engine.stage_pages import GroupPages


class Status(Enum):
    """Where a sequence is. Only RUNNING ones hold pages and a table row.

    NEW: not queued; siblings stay so while the first of them computes the prompt they share.
    """

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One prompt with its ``n`` sequences; finished when all of them are.

    ``boundaries`` are counts of prompt tokens, ascending: what lies behind one is fed in a later
    step than what lies before it. With ``pooling``, nothing is generated: ``pooled`` gathers what
    makes the embedding. Of each sequence, the first ``num_shareable`` tokens have KV that others
    may share; ``kv_policy`` or ``slot_policy``, with its ``schedule``, decide what it keeps.
    ``gang``: of its sequences, if they are one. ``drafting`` guesses its tokens. Its KV is coded
    in ``units``, one for each cache group, if at all. Where layers drop tokens of the prompt,
    ``stages`` says how many slots each has, and the boundaries are those of methods alone: what is
    dropped follows from them. ``most_prompt_pages``, for each cache group: what the prompt takes at
    most at once while it is read, if it is coded and that has been asked.
    """

    __slots__ = (
        "boundaries",
        "cache_profile",
        "drafting",
        "gang",
        "kv_policy",
        "max_tokens",
        "metrics",
        "most_prompt_pages",
        "num_shareable",
        "params",
        "pooled",
        "pooling",
        "priority",
        "profile",
        "prompt_logprobs",
        "prompt_token_ids",
        "request_id",
        "schedule",
        "sequences",
        "slot_policy",
        "stages",
        "unfinished",
        "units",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        max_tokens: int,
        priority: int,
        profile: Profile,
        arrival_time: float,
        boundaries: tuple[int, ...] = (),
        pooling: Pooling | None = None,
        block_size: int = 1,
        units: tuple[CodedUnit, ...] = (),
    ) -> None:
        self.units = units
        self.request_id = request_id
        asked = profile.boundaries(len(prompt_token_ids))
        self.stages: StageSlots | None = None
        for method in of_kind(profile.methods, TokenPruningMethod):
            boundaries = ()
            self.stages = StageSlots(method, sorted(asked))
        self.most_prompt_pages: list[int] = []
        self.boundaries = tuple(sorted({*boundaries, *asked}))
        self.pooling: Pooling | None = pooling
        self.pooled: npt.NDArray[np.float32] | None = None
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.max_tokens = max_tokens
        self.priority = priority
        self.profile = profile
        self.cache_profile = profile.of_cache if profile.methods else profile
        self.kv_policy = next(iter(of_kind(profile.methods, KVPolicy)), None)
        self.slot_policy = next(iter(of_kind(profile.methods, SlotPolicy)), None)
        self.schedule: CompactionSchedule | None = None
        if self.slot_policy is not None:
            self.schedule = self.slot_policy.schedule(block_size)
        self.drafting = next(iter(of_kind(profile.methods, DraftMethod)), None)
        shared = profile.shared_tokens(len(prompt_token_ids))
        self.num_shareable = sys.maxsize if shared is None else shared
        self.metrics = RequestMetrics(arrival_time)
        self.sequences: list[Sequence] = []
        self.gang: Gang | None = None
        self.unfinished = params.n
        wanted = params.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs | None] | None = [None] if wanted else None

    @property
    def num_unscored(self) -> int:
        """Prompt tokens whose log-probability is wanted and not known yet."""
        if self.prompt_logprobs is None:
            return 0
        return len(self.prompt_token_ids) - len(self.prompt_logprobs)

    @property
    def needs_all_inputs(self) -> bool:
        """Whether every prompt token has to be fed, cached or not."""
        whole = self.num_unscored > 0 or self.pooling in ("mean", "first")
        return whole or self.profile.needs_all_inputs

    def pool(self, hidden: npt.NDArray[np.float32]) -> None:
        """Add what a step made of some inputs."""
        if self.pooled is None or self.pooling == "last":
            self.pooled = hidden
        elif self.pooling == "mean":
            self.pooled = self.pooled + hidden

    @property
    def embedding(self) -> npt.NDArray[np.float32] | None:
        """The prompt's embedding ``[hidden]``, when all of it has been fed."""
        if self.pooled is None or self.pooling != "mean":
            return self.pooled
        return self.pooled / np.float32(len(self.prompt_token_ids))


class Sequence:
    """One stream of tokens: known tokens, of which a part has been fed to the model.

    Three counters that may differ once methods drop, inject or move tokens: ``num_fed`` known
    tokens have been given to the model, they take ``num_slots`` KV slots, and the next input has
    position ``next_position``; ``num_adopted`` were found in the cache when it was admitted (-1:
    it goes on where another sequence was). KV lies in ``runs`` (sealed) followed by ``tail``
    (columns of writable pages, one page per cache group). ``num_sealed`` runs there have been, of
    which those with ``ordinals`` are left; of the first ``num_passed`` the sequence no longer holds
    the pages with a window. Where slots have been reduced, ``compacted`` comes in place of the
    runs, and ``spare`` columns are what the compaction of this step fills, or a coded unit.
    ``units`` come before the slots, and are none. Its own context begins at slot ``begin``; see
    ``PlanRow``. Where layers drop tokens, all that it has is in ``groups``, one for each cache
    group, and ``num_slots`` counts tokens.
    """

    __slots__ = (
        "arrival",
        "begin",
        "compacted",
        "draft_gain",
        "groups",
        "index",
        "next_position",
        "num_adopted",
        "num_fed",
        "num_passed",
        "num_sealed",
        "num_slots",
        "number",
        "ordinals",
        "request",
        "runs",
        "spare",
        "state",
        "status",
        "table_row",
        "tail",
        "text",
        "token_ids",
        "units",
    )

    def __init__(
        self,
        number: int,
        request: Request,
        index: int,
        state: SampleState,
        text: TextStream | None,
    ) -> None:
        self.number = number
        self.arrival = number
        self.request = request
        self.index = index
        self.token_ids = list(request.prompt_token_ids)
        self.state = state
        self.text = text
        self.draft_gain = None if request.drafting is None else DraftGain()
        self.status = Status.NEW
        self.table_row = -1
        self.runs: list[SealedRun] = []
        self.ordinals: list[int] = []
        self.tail: list[list[int]] = []
        self.compacted: SealedRun | None = None
        self.spare: list[list[int]] = []
        self.units: list[SealedRun] = []
        self.groups: list[GroupPages] = []
        self.num_fed = self.num_slots = self.next_position = 0
        self.num_sealed = self.num_passed = self.begin = 0
        self.num_adopted = -1

    @property
    def together(self) -> list[Sequence]:
        """The sequences that wait, run and are preempted as one, of which it is the first."""
        gang = self.request.gang
        return [self] if gang is None else gang.members

    @property
    def priority(self) -> int:
        """Smaller is more urgent."""
        return self.request.priority

    @property
    def num_pending(self) -> int:
        """Known tokens that have not been fed."""
        return len(self.token_ids) - self.num_fed

    @property
    def num_feedable(self) -> int:
        """Pending tokens that one step may feed: those up to the next boundary or compaction.

        Where layers drop tokens, a step feeds all of these if they are a part of the prompt.
        """
        end = len(self.token_ids)
        boundaries = self.request.boundaries
        if boundaries and boundaries[-1] > self.num_fed:
            end = next(boundary for boundary in boundaries if boundary > self.num_fed)
        if self.request.schedule is not None:
            end = min(end, self.request.schedule.next_stop(self.num_fed))
        if self.request.stages is not None:
            if self.num_fed >= self.request.stages.prompt:
                for held, unit in zip(self.groups, self.request.units, strict=False):
                    end = min(end, self.num_fed + unit.slots - held.slots)
        elif self.request.units:
            end = min(end, self.num_fed - self.num_slots + self.request.units[0].slots)
        return end - self.num_fed

    @property
    def draft_room(self) -> int:
        """Tokens that may be guessed behind the one that is pending.

        None before the sequence has parted from its siblings, and none where guessing does not
        pay. A request that names a seed must not depend on how long steps take.
        """
        method, done = self.request.drafting, len(self.state.output_token_ids)
        if method is None or done == 0 or self.num_pending != 1:
            return 0
        assert self.draft_gain is not None
        params = self.request.params
        fixed = method.always_on or (params.seed is not None and not params.greedy)
        if not fixed and not self.draft_gain.pays:
            return 0
        return min(method.most_drafted, self.request.max_tokens - done - 1)

    def forget_cache(self) -> None:
        """All known tokens are pending again; the caller has released runs and tail."""
        self.request.pooled = None
        self.runs = []
        self.ordinals = []
        self.tail = []
        self.compacted = None
        self.spare = []
        self.units = []
        self.groups = []
        self.num_fed = self.num_slots = self.next_position = 0
        self.num_sealed = self.num_passed = self.begin = 0
