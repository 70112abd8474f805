"""The prefix tree against a model that searches by brute force."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.contracts.profile import EXACT, Profile
from headrace.engine.prefix_tree import PrefixTree, RunKey, SealedRun

SIZE = 2
PROFILES = (EXACT, Profile(salt="tenant"))
Path = tuple[Profile, tuple[RunKey, ...]]


@dataclass
class Model:
    """All runs by their whole path: how many users, and since when idle."""

    users: dict[Path, int] = field(default_factory=dict)
    idle_since: dict[Path, int] = field(default_factory=dict)
    time: int = 0

    def match(self, profile: Profile, tokens: list[int], most: int) -> int:
        """Runs of the longest known prefix, trying all lengths."""
        keys = tuple(
            tuple(tokens[i : i + SIZE]) for i in range(0, len(tokens) // SIZE * SIZE, SIZE)
        )
        known = [n for n in range(len(keys) + 1) if n == 0 or (profile, keys[:n]) in self.users]
        return min(max(known), most)

    def hold(self, path: Path) -> None:
        self.users[path] = self.users.get(path, 0) + 1
        self.idle_since.pop(path, None)

    def drop(self, path: Path) -> None:
        self.time += 1
        self.users[path] -= 1
        if self.users[path] == 0:
            self.idle_since[path] = self.time

    def evict(self) -> Path:
        path = min(self.idle_since, key=self.idle_since.__getitem__)
        del self.users[path], self.idle_since[path]
        return path


@dataclass
class Holder:
    """A sequence: the runs it holds, from the root on."""

    profile: Profile
    tokens: list[int]
    runs: list[SealedRun]

    def path(self, length: int) -> Path:
        keys = [tuple(self.tokens[i * SIZE : (i + 1) * SIZE]) for i in range(length)]
        return self.profile, tuple(keys)


class Pair:
    """A tree and its model, kept in step."""

    def __init__(self) -> None:
        self.tree, self.model = PrefixTree(SIZE), Model()
        self.holders: list[Holder] = []
        self.pages = 0
        self.paths: dict[int, Path] = {}

    def start(self, profile: Profile, tokens: list[int], most: int) -> None:
        runs = self.tree.match(profile, tokens, most)
        assert len(runs) == self.model.match(profile, tokens, most)
        assert [run.key for run in runs] == list(Holder(profile, tokens, runs).path(len(runs))[1])
        holder = Holder(profile, list(tokens), [])
        for run in runs:
            self._hold(holder, run)
        self.holders.append(holder)

    def _hold(self, holder: Holder, run: SealedRun) -> None:
        self.tree.hold(run)
        holder.runs.append(run)
        self.model.hold(holder.path(len(holder.runs)))

    def extend(self, holder: Holder, key: RunKey) -> None:
        del holder.tokens[len(holder.runs) * SIZE :]
        holder.tokens += key
        self.pages += 1
        parent = holder.runs[-1] if holder.runs else self.tree.root(holder.profile)
        known = holder.path(len(holder.runs) + 1) in self.model.users
        run, spare = self.tree.insert(parent, key, (self.pages,))
        assert (run.pages == (self.pages,)) == (not known), "a known run keeps its pages"
        assert spare == ([self.pages] if known else [])
        self._hold(holder, run)
        self.paths.setdefault(run.pages[0], holder.path(len(holder.runs)))

    def release(self, holder: Holder) -> None:
        self.holders.remove(holder)
        for length in range(len(holder.runs), 0, -1):
            assert not self.tree.drop(holder.runs[length - 1]), "a run of the tree keeps its pages"
            self.model.drop(holder.path(length))

    def evict(self) -> None:
        if not self.model.idle_since:
            return
        profile, keys = self.model.evict()
        (page,) = self.tree.evict()
        assert self.paths[page] == (profile, keys)
        assert not any(
            other[0] == profile and other[1][: len(keys)] == keys for other in self.model.users
        ), "a run is evicted before those that continue it"

    def check(self) -> None:
        users: dict[SealedRun, int] = {}
        for holder in self.holders:
            for run in holder.runs:
                users[run] = users.get(run, 0) + 1
        self.tree.check_integrity(users, {})
        assert len(self.tree.runs()) == len(self.model.users)
        assert self.tree.num_idle_pages == len(self.model.idle_since)


token = st.integers(0, 1)
operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("start"),
            st.sampled_from(PROFILES),
            st.lists(token, max_size=9),
            st.integers(0, 4),
        ),
        st.tuples(st.just("extend"), st.integers(0, 9), st.tuples(token, token)),
        st.tuples(st.just("release"), st.integers(0, 9)),
        st.tuples(st.just("evict")),
    ),
    max_size=80,
)


@given(operations)
def test_tree_equals_brute_force(steps: list[tuple]) -> None:  # type: ignore[type-arg]
    pair = Pair()
    for action, *arguments in steps:
        if action == "start":
            pair.start(*arguments)
        elif action == "evict":
            pair.evict()
        elif pair.holders:
            holder = pair.holders[arguments[0] % len(pair.holders)]
            if action == "extend":
                pair.extend(holder, arguments[1])
            else:
                pair.release(holder)
        pair.check()
    for holder in list(pair.holders):
        pair.release(holder)
    while pair.model.idle_since:
        pair.evict()
        pair.check()
    assert pair.tree.runs() == [] and pair.tree._roots == {}


def test_equal_tokens_under_another_profile_are_not_found() -> None:
    tree = PrefixTree(SIZE)
    tree.insert(tree.root(EXACT), (1, 2), (7,))
    assert [run.pages for run in tree.match(EXACT, [1, 2, 3], 9)] == [(7,)]
    assert tree.match(Profile(adapter="adapter@1"), [1, 2, 3], 9) == []


def test_equal_tokens_after_other_tokens_are_not_found() -> None:
    tree = PrefixTree(SIZE)
    first, _ = tree.insert(tree.root(EXACT), (1, 2), (7,))
    tree.insert(first, (3, 4), (8,))
    assert tree.match(EXACT, [3, 4], 9) == []
    assert tree.match(EXACT, [9, 9, 3, 4], 9) == []


def test_a_page_of_fewer_tokens_is_never_matched() -> None:
    tree = PrefixTree(SIZE)
    tree.insert(tree.root(EXACT), (1, 2), (7,))
    assert tree.match(EXACT, [1], 9) == []


def test_integrity_check_finds_damage() -> None:
    tree = PrefixTree(SIZE)
    run, _ = tree.insert(tree.root(EXACT), (1, 2), (7,))
    with pytest.raises(AssertionError, match="users, not counted"):
        tree.check_integrity({run: 1}, {})
    tree._idle.clear()
    with pytest.raises(AssertionError, match="idle"):
        tree.check_integrity({}, {})
    tree._idle[run] = tree._idle[SealedRun((8,), (3, 4), run)] = None
    with pytest.raises(AssertionError, match="idle queue"):
        tree.check_integrity({}, {})


class TestWindows:
    """Pages of groups with a window come and go within their runs."""

    @staticmethod
    def tree() -> tuple[PrefixTree, SealedRun]:
        """A tree with one run of a lasting page and one with a window."""
        tree = PrefixTree(SIZE, (False, True))
        run, spare = tree.insert(tree.root(EXACT), (1, 2), (7, 8))
        assert spare == []
        return tree, run

    def test_the_window_is_evicted_while_the_run_is_held(self) -> None:
        tree, run = self.tree()
        tree.hold(run)
        tree.hold_window(run)
        assert tree.num_idle_pages == 0
        assert tree.drop_window(run) == []
        assert tree.num_idle_pages == 1
        assert tree.evict() == [8] and not run.has_window
        tree.check_integrity({run: 1}, {})

    def test_what_was_idle_longer_goes_first(self) -> None:
        tree, first = self.tree()
        second, _ = tree.insert(first, (3, 4), (9, 10))
        for run in (first, second):
            tree.hold(run)
            tree.hold_window(run)
        for run in (second, first):
            assert tree.drop(run) == tree.drop_window(run) == []
        assert [tree.evict(), tree.evict()] == [[9, 10], [7, 8]]
        assert tree.runs() == [] and tree.num_idle_pages == 0

    def test_a_run_takes_back_what_it_lost(self) -> None:
        tree, run = self.tree()
        tree.hold(run)
        assert tree.evict() == [8]
        again, spare = tree.insert(tree.root(EXACT), (1, 2), (11, 12))
        assert again is run and run.pages == (7, 12) and spare == [11] and run.has_window
        tree.check_integrity({run: 1}, {})

    def test_outside_the_tree_pages_are_free_at_once(self) -> None:
        tree = PrefixTree(SIZE, (False, True))
        run = tree.new_run((7, 8), (1, 2))
        tree.hold(run)
        tree.hold_window(run)
        assert tree.drop_window(run) == [8]
        assert tree.drop(run) == [7]

    def test_integrity_check_finds_damage(self) -> None:
        tree, run = self.tree()
        with pytest.raises(AssertionError, match="users, not counted"):
            tree.check_integrity({}, {run: 1})
        run.has_window = False
        with pytest.raises(AssertionError, match="idle windows"):
            tree.check_integrity({}, {})
