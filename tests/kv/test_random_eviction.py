"""Random eviction."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.contracts.kv_policy import SealedPages
from headrace.kv.policies.random_eviction import RandomEviction


@given(st.floats(0.01, 1), st.integers(0, 9), st.lists(st.integers(1, 20), min_size=1, max_size=12))
def test_chunks_do_not_matter(keep: float, seed: int, chunks: list[int]) -> None:
    policy = RandomEviction(keep, seed)
    held: list[int] = []
    sealed = 0
    for chunk in chunks:
        held += range(sealed, sealed + chunk)
        sealed += chunk
        [dropped] = policy.drop([SealedPages(held, sealed)])
        held = [ordinal for ordinal in held if ordinal not in dropped]
        assert len(held) <= policy.most_pages(sealed) <= keep * sealed + 1
    [dropped] = policy.drop([SealedPages(list(range(sealed)), sealed)])
    assert held == [ordinal for ordinal in range(sealed) if ordinal not in dropped]


def test_the_share_is_kept_and_the_seed_matters() -> None:
    pages = SealedPages(list(range(400)), 400)
    [first] = RandomEviction(0.25).drop([pages])
    [second] = RandomEviction(0.25, seed=1).drop([pages])
    assert len(first) == len(second) == 300
    assert first != second
    assert RandomEviction(1.0).drop([pages, pages]) == [[], []]
