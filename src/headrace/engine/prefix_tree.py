"""Sealed runs of KV pages, and the radix tree that finds them again by their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from headrace.contracts.profile import Profile
from headrace.contracts.slot_policy import CompactionSchedule

RunKey = tuple[int, ...]


class SealedRun:
    """One immutable page of KV per cache group, with the tokens it was computed from.

    A run is *held* while ``users`` > 0, else *idle*; idle runs stay in the tree until their
    pages are needed. Of the groups with a window, the pages go earlier: sequences hold them
    (``window_users``) only as long as they may read them, and once they are gone
    (``has_window`` is false) the rest of the run stays. A run outside the tree (``parent`` is
    None) loses what nobody holds at once.

    A *compacted* run stands for all of the ``tokens`` up to its end; it has any number of pages per
    group, and whoever holds it does not hold its parents. These may lose their pages and stay as
    ``hollow`` runs, which only lead to it. A coded unit has any number of pages as well, and
    stands for its own tokens alone.
    """

    __slots__ = (
        "children",
        "has_window",
        "hollow",
        "idle_since",
        "key",
        "pages",
        "parent",
        "tokens",
        "users",
        "window_idle_since",
        "window_users",
    )

    def __init__(
        self,
        pages: tuple[int, ...],
        key: RunKey,
        parent: SealedRun | None,
        has_window: bool = False,
        tokens: int = 0,
    ) -> None:
        self.pages = pages
        self.tokens = tokens
        self.hollow = False
        self.key = key
        self.parent = parent
        self.children: dict[RunKey, SealedRun] = {}
        self.users = self.window_users = 0
        self.idle_since = self.window_idle_since = 0
        self.has_window = has_window


class PrefixTree:
    """A radix tree whose edges are whole pages of token ids, with one root per profile.

    Invariants: the ancestors of a held run are held (a sequence holds its runs from the root
    on), so of two idle runs on a path the deeper one became idle first; the front of the idle
    queue therefore never has children, unless they are compacted or lead to such. Whoever holds
    the pages of a run that have a window also holds the run.

    Args:
        block_size: tokens of a run.
        windowed: for each cache group, whether it has a window.
    """

    def __init__(self, block_size: int, windowed: Sequence[bool] = (False,)) -> None:
        self._block_size = block_size
        self._windowed = tuple(windowed)
        self._has_windows = any(windowed)
        self._roots: dict[Profile, SealedRun] = {}
        self._idle: OrderedDict[SealedRun, None] = OrderedDict()
        self._idle_windows: OrderedDict[SealedRun, None] = OrderedDict()
        self._ticks = 0
        self._num_idle_compacted = self._num_idle_compacted_pages = 0

    @property
    def num_idle_pages(self) -> int:
        """Pages that could be evicted now."""
        windows = sum(self._windowed)
        lasting = len(self._windowed) - windows
        growing = len(self._idle) - self._num_idle_compacted
        compacted = self._num_idle_compacted_pages
        return growing * lasting + compacted + len(self._idle_windows) * windows

    def root(self, profile: Profile) -> SealedRun:
        """The anchor of a profile's runs; it holds no pages."""
        if profile not in self._roots:
            self._roots[profile] = SealedRun((), (), None)
        return self._roots[profile]

    def match(self, profile: Profile, token_ids: Sequence[int], max_runs: int) -> list[SealedRun]:
        """The longest path of runs that spells the beginning of ``token_ids``."""
        found: list[SealedRun] = []
        node = self._roots.get(profile)
        size = self._block_size
        while node is not None and len(found) < max_runs:
            start = len(found) * size
            node = node.children.get(tuple(token_ids[start : start + size]))
            if node is not None:
                found.append(node)
        return found

    def match_compacted(
        self, profile: Profile, token_ids: Sequence[int], limit: int, schedule: CompactionSchedule
    ) -> list[SealedRun]:
        """As ``match``, for a sequence whose slots are reduced: up to ``limit`` tokens.

        Either one compacted run, or those before the first compaction is observed.
        """
        first = schedule.first
        path = self.match(profile, token_ids, min(limit, first) // self._block_size)
        node = path[-1].children.get(()) if len(path) * self._block_size == first else None
        deepest, end = None, first
        while node is not None:
            deepest = deepest if node.hollow else node
            key = tuple(token_ids[end : end + schedule.interval])
            end += schedule.interval
            node = node.children.get(key) if end <= limit else None
        if deepest is not None:
            return [deepest]
        found = []
        for run in path[: (first - schedule.window) // self._block_size]:
            if run.hollow:
                break
            found.append(run)
        return found

    def match_units(
        self, profile: Profile, token_ids: Sequence[int], limit: int, slots: int
    ) -> list[SealedRun]:
        """As ``match``, in units of so many tokens, up to ``limit`` tokens."""
        found: list[SealedRun] = []
        node = self._roots.get(profile)
        while node is not None and (len(found) + 1) * slots <= limit:
            start = len(found) * slots
            node = node.children.get(tuple(token_ids[start : start + slots]))
            if node is not None:
                found.append(node)
        return found

    def new_run(self, pages: tuple[int, ...], key: RunKey, tokens: int = 0) -> SealedRun:
        """A run outside the tree."""
        return SealedRun(pages, key, None, self._has_windows, tokens)

    def insert(
        self, parent: SealedRun, key: RunKey, pages: tuple[int, ...], tokens: int = 0
    ) -> tuple[SealedRun, list[int]]:
        """The run for ``key`` below ``parent``, and those of ``pages`` that it did not take.

        A run that is there keeps its pages, and takes what it has lost of those with a window.
        ``tokens``: see ``SealedRun``.
        """
        run = parent.children.get(key)
        if run is not None and run.hollow:
            run.pages, run.hollow = pages, False
            self._rest(run)
            return run, []
        if run is None:
            run = SealedRun(pages, key, parent, self._has_windows, tokens)
            parent.children[key] = run
            self._rest(run)
            self._rest_window(run)
            return run, []
        if run.has_window or not self._has_windows:
            return run, list(pages)
        pairs = list(zip(run.pages, pages, self._windowed, strict=True))
        run.pages = tuple(new if windowed else old for old, new, windowed in pairs)
        run.has_window = True
        self._rest_window(run)
        return run, [new for _, new, windowed in pairs if not windowed]

    def _rest(self, run: SealedRun) -> None:
        self._ticks += 1
        run.idle_since = self._ticks
        self._idle[run] = None
        self._count_idle(run, 1)

    def _wake(self, run: SealedRun) -> None:
        del self._idle[run]
        self._count_idle(run, -1)

    def _count_idle(self, run: SealedRun, sign: int) -> None:
        if run.tokens:
            self._num_idle_compacted += sign
            self._num_idle_compacted_pages += sign * len(run.pages)

    def _rest_window(self, run: SealedRun) -> None:
        if run.has_window:
            self._ticks += 1
            run.window_idle_since = self._ticks
            self._idle_windows[run] = None

    def hold(self, run: SealedRun) -> None:
        """Add a user."""
        if run in self._idle:
            self._wake(run)
        run.users += 1

    def hold_window(self, run: SealedRun) -> None:
        """Add a user of the pages with a window, which must be there."""
        if not self._has_windows:
            return
        if run.window_users == 0:
            self._idle_windows.pop(run, None)
        run.window_users += 1

    def drop(self, run: SealedRun) -> list[int]:
        """Take a user away; the pages that nobody can find again are returned."""
        run.users -= 1
        if run.users > 0:
            return []
        if run.parent is None:
            return self._lasting(run)
        self._rest(run)
        return []

    def drop_window(self, run: SealedRun) -> list[int]:
        """Take a user of the pages with a window away; as ``drop``."""
        if not self._has_windows:
            return []
        run.window_users -= 1
        if run.window_users > 0:
            return []
        if run.parent is None:
            return self._lose_window(run)
        self._rest_window(run)
        return []

    def _lasting(self, run: SealedRun) -> list[int]:
        return self._select(run, windowed=False)

    def _lose_window(self, run: SealedRun) -> list[int]:
        run.has_window = False
        return self._select(run, windowed=True)

    def _select(self, run: SealedRun, *, windowed: bool) -> list[int]:
        """Its pages of the groups with a window, or without."""
        if run.tokens:
            return [] if windowed else list(run.pages)
        if run.hollow:
            return []
        pairs = zip(run.pages, self._windowed, strict=True)
        return [page for page, has_window in pairs if has_window == windowed]

    def evict(self) -> list[int]:
        """Remove what has been idle longest, a run or its pages with a window; returns its pages.

        They may be none, for a run that had lost them all.
        """
        run = next(iter(self._idle), None)
        window = next(iter(self._idle_windows), None)
        if window is not None and (run is None or window.window_idle_since < run.idle_since):
            del self._idle_windows[window]
            return self._lose_window(window)
        assert run is not None
        self._wake(run)
        pages = self._lasting(run)
        if run.has_window:
            del self._idle_windows[run]
            pages += self._lose_window(run)
        run.pages, run.hollow = (), True
        self._prune(run)
        return pages

    def _prune(self, run: SealedRun) -> None:
        """Take out a hollow run that leads nowhere, and those that lead only to it."""
        while run.hollow and not run.children and run.parent is not None:
            parent = run.parent
            del parent.children[run.key]
            run = parent
        if run.parent is None and not run.children:
            self._roots = {p: root for p, root in self._roots.items() if root is not run}

    def runs(self) -> list[SealedRun]:
        """All runs of the tree."""
        found: list[SealedRun] = []
        stack = list(self._roots.values())
        while stack:
            children = list(stack.pop().children.values())
            found += children
            stack += children
        return found

    def pages_of(self, run: SealedRun) -> list[int]:
        """The pages that a run has."""
        pages = self._lasting(run)
        return pages + self._select(run, windowed=True) if run.has_window else pages

    def check_integrity(
        self, users: dict[SealedRun, int], window_users: dict[SealedRun, int]
    ) -> None:
        """Compare user counts with those counted from the sequences, and the idle queues."""
        runs = self.runs()
        if len(self._idle) != sum(run.users == 0 and not run.hollow for run in runs):
            raise AssertionError("the idle queue and the tree disagree")
        if len(self._idle_windows) != sum(r.has_window and not r.window_users for r in runs):
            raise AssertionError("the queue of idle windows and the tree disagree")
        for run in {*runs, *users}:
            name = f"run of pages {run.pages}"
            if run.users != users.get(run, 0) or run.window_users != window_users.get(run, 0):
                raise AssertionError(f"{name}: {run.users} users, not counted")
            if run.window_users and (not run.has_window or run.window_users > run.users):
                raise AssertionError(f"{name}: its window is read and not there")
        for run in runs:
            if (run.users == 0 and not run.hollow) != (run in self._idle):
                raise AssertionError(f"run of pages {run.pages} is idle and held at once")
            if (run.has_window and not run.window_users) != (run in self._idle_windows):
                raise AssertionError(f"run of pages {run.pages}: its window is idle and held")
            if run.hollow and not run.children:
                raise AssertionError("a run without pages leads nowhere")
            if run.tokens or run.parent is None or run.parent.parent is None:
                continue
            if run.users > run.parent.users:
                raise AssertionError(f"run of pages {run.pages} outlives its prefix")
