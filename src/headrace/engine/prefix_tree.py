"""Sealed runs of KV pages, and the radix tree that finds them again by their tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from headrace.contracts.profile import Profile

RunKey = tuple[int, ...]


class SealedRun:
    """One immutable page of KV per cache group, with the tokens it was computed from.

    A run is *held* while ``users`` > 0, else *idle*; idle runs stay in the tree until their
    pages are needed. A run outside the tree (``parent`` is None) dies with its last user.
    """

    __slots__ = ("children", "key", "pages", "parent", "users")

    def __init__(self, pages: tuple[int, ...], key: RunKey, parent: SealedRun | None) -> None:
        self.pages = pages
        self.key = key
        self.parent = parent
        self.children: dict[RunKey, SealedRun] = {}
        self.users = 0


class PrefixTree:
    """A radix tree whose edges are whole pages of token ids, with one root per profile.

    Invariants: the ancestors of a held run are held (a sequence holds its runs from the root
    on), so of two idle runs on a path the deeper one became idle first; the front of the idle
    queue therefore never has children.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._roots: dict[Profile, SealedRun] = {}
        self._idle: OrderedDict[SealedRun, None] = OrderedDict()

    @property
    def num_idle(self) -> int:
        """Runs that could be evicted now."""
        return len(self._idle)

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

    def insert(self, parent: SealedRun, key: RunKey, pages: tuple[int, ...]) -> SealedRun:
        """The run for ``key`` below ``parent``: the one that is there, or a new one."""
        run = parent.children.get(key)
        if run is None:
            run = SealedRun(pages, key, parent)
            parent.children[key] = run
            self._idle[run] = None
        return run

    def hold(self, run: SealedRun) -> None:
        """Add a user."""
        if run.users == 0:
            self._idle.pop(run, None)
        run.users += 1

    def drop(self, run: SealedRun) -> bool:
        """Take a user away; true when the run is outside the tree and had no other user."""
        run.users -= 1
        if run.users > 0:
            return False
        if run.parent is None:
            return True
        self._idle[run] = None
        return False

    def evict(self) -> SealedRun:
        """Remove the run that has been idle longest, and return it for its pages."""
        run, _ = self._idle.popitem(last=False)
        parent = run.parent
        assert parent is not None and not run.children
        del parent.children[run.key]
        if parent.parent is None and not parent.children:
            self._roots = {p: root for p, root in self._roots.items() if root is not parent}
        return run

    def runs(self) -> list[SealedRun]:
        """All runs of the tree."""
        found: list[SealedRun] = []
        stack = list(self._roots.values())
        while stack:
            children = list(stack.pop().children.values())
            found += children
            stack += children
        return found

    def check_integrity(self, users: dict[SealedRun, int]) -> None:
        """Compare user counts with ``users``, counted from the sequences, and the idle queue."""
        runs = self.runs()
        if len(self._idle) != sum(run.users == 0 for run in runs):
            raise AssertionError("the idle queue and the tree disagree")
        for run in runs:
            if run.users != users.get(run, 0):
                raise AssertionError(f"run of pages {run.pages}: {run.users} users, not counted")
            if (run.users == 0) != (run in self._idle):
                raise AssertionError(f"run of pages {run.pages} is idle and held at once")
            if run.parent is not None and run.parent.parent and run.users > run.parent.users:
                raise AssertionError(f"run of pages {run.pages} outlives its prefix")
