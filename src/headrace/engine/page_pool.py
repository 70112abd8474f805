"""Which pages of the arena are free, and how many holders each of the others has."""

from __future__ import annotations


class OutOfPagesError(Exception):
    """More pages were asked for than are free; the caller had to check first."""


class PagePool:
    """Free list and reference counts over ``num_pages`` page numbers.

    Invariant: a page is in the free list exactly if its count is 0.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages, each with one reference. Raises OutOfPagesError."""
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages wanted, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def retain(self, page: int) -> None:
        """Add a holder to a page that has one."""
        if self.references[page] < 1:
            raise ValueError(f"page {page} is free and cannot be shared")
        self.references[page] += 1

    def release(self, page: int) -> None:
        """Take a holder away; the page is free when it was the last."""
        count = self.references[page] - 1
        if count < 0:
            raise ValueError(f"page {page} was released more often than held")
        self.references[page] = count
        if count == 0:
            self._free.append(page)

    def check_integrity(self, expected: list[int]) -> None:
        """Compare the counts with ``expected``, counted from the holders, and the free list."""
        if self.references != expected:
            wrong = [p for p in range(self.num_pages) if self.references[p] != expected[p]]
            raise AssertionError(f"pages {wrong[:8]} have wrong reference counts")
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a page is in the free list twice")
        if free != {p for p, count in enumerate(expected) if count == 0}:
            raise AssertionError("the free list and the reference counts disagree")
