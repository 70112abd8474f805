"""Whether counts can come from a distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping


def chi_square(observed: Iterable[Hashable], expected: Mapping[Hashable, float]) -> float:
    """Pearson's statistic in standard deviations of its distribution: beyond 5 is no chance.

    Outcomes that are expected fewer than five times are taken together.
    """
    counts = Counter(observed)
    total = counts.total()
    assert not counts.keys() - {key for key, share in expected.items() if share > 0}
    cells: list[tuple[float, int]] = []
    rare, rarely = 0.0, 0
    for outcome, share in expected.items():
        if share * total < 5:
            rare, rarely = rare + share * total, rarely + counts[outcome]
        else:
            cells.append((share * total, counts[outcome]))
    if rare >= 5:
        cells.append((rare, rarely))
    freedom = len(cells) - 1
    assert freedom > 0
    statistic = sum((count - mean) ** 2 / mean for mean, count in cells)
    return (statistic - freedom) / (2 * freedom) ** 0.5
