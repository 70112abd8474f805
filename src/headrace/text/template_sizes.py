"""How large the values of a chat template are, and how large an operation would make them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from jinja2.exceptions import SecurityError

MOST_CHARACTERS = 1 << 26
"""Of one value; an entry of a list or an object counts as 32."""
MOST_BITS = 1 << 12
"""Of one integer."""
ENTRY = 32

_CONTAINERS: Any = (list, tuple, dict, type({}.keys()), type({}.values()), type({}.items()))
_SIZED: Any = (*_CONTAINERS, range)
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def check_size(size: int) -> None:
    """Raises SecurityError if a value may not be of this size, in characters."""
    if size > MOST_CHARACTERS:
        raise SecurityError(f"it makes more than {MOST_CHARACTERS} characters")


def own_size(value: Any) -> int:
    """Characters that a value counts as, what its entries hold set aside."""
    if isinstance(value, str):
        return len(value)
    return ENTRY * len(value) if isinstance(value, _SIZED) else 0


def whole_size(value: Any) -> tuple[int, int]:
    """Characters that a value counts as with all that it holds, as often as it holds it, and the
    number of entries. Raises SecurityError where they are too many.
    """
    size = entries = 0
    waiting: list[Iterable[Any]] = [(value,)]
    while waiting:
        for each in waiting.pop():
            if isinstance(each, str):
                size += len(each)
            elif isinstance(each, _CONTAINERS):
                size += own_size(each)
                entries += len(each)
                waiting.append(each)
                if isinstance(each, dict):
                    waiting.append(each.values())
            elif isinstance(each, range):
                size += own_size(each)
        check_size(size)
    return size, entries


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Raises SecurityError if what an operator makes of its operands is too large."""
    _CHECKS[operator](left, right)


def check_fields(text: str, mark: str, values: Sequence[Any]) -> None:
    """Raises SecurityError if a text could become too large with values in place of its fields.

    Args:
        mark: that begins a field: "%" or "{".
    """
    fields = text.replace(mark * 2, "")  # that stands for itself
    if re.search(r"\{[^{}]*\{" if mark == "{" else r"%[^%a-zA-Z]*\*", fields):
        raise SecurityError("it has a format whose width is not written in it")
    widths = [int(digits[:9]) for digits in re.findall(r"\d+", text)]
    check_size(len(text) + text.count(mark) * (max(widths, default=0) + whole_size(values)[0]))


def _check_sum(left: Any, right: Any) -> None:
    check_size(own_size(left) + own_size(right))


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())
    for value, count in ((left, right), (right, left)):
        if isinstance(count, int):
            check_size(whole_size(value)[0] * count)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() * abs(right))


def _check_remainder(left: Any, right: Any) -> None:
    if isinstance(left, str):
        check_fields(left, "%", right if isinstance(right, tuple) else [right])


_CHECKS = {"+": _check_sum, "*": _check_product, "**": _check_power, "%": _check_remainder}


def _check_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise SecurityError(f"it makes an integer of more than {MOST_BITS} bits")


def _padded(text: str, width: int = 80, *_: Any) -> int:
    return max(len(text), width)


def _replaced(text: Any, old: Any, new: Any, count: int | None = None) -> int:
    times = str(text).count(str(old))
    times = times if count is None or count < 0 else min(times, count)
    return len(str(text)) + times * len(str(new))


def _indented(text: str, width: int | str = 4, *_: Any, **__: Any) -> int:
    each = len(width) if isinstance(width, str) else width
    return len(text) + each * (1 + _lines(text))


def _joined(separator: str, parts: Sequence[str]) -> int:
    return sum(map(len, parts)) + len(separator) * len(parts)


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    most = MOST_CHARACTERS // ENTRY
    parts = text.count(sep) if sep else sum(1 for _ in islice(re.finditer(r"\s+", text), most))
    return ENTRY * (1 + (parts if maxsplit < 0 else min(parts, maxsplit)))


def _split_lines(text: str, *_: Any, **__: Any) -> int:
    return ENTRY * _lines(text)


def _lines(text: str) -> int:
    return 1 + sum(map(text.count, _LINE_ENDS))


GROWTH_OF_METHODS: Mapping[str, Callable[..., int]] = {
    "center": _padded,
    "join": _joined,
    "ljust": _padded,
    "replace": _replaced,
    "rjust": _padded,
    "rsplit": _split,
    "split": _split,
    "splitlines": _split_lines,
    "zfill": _padded,
}
"""The size of what a method of a text makes, given the same arguments."""
GROWTH_OF_FILTERS: Mapping[str, Callable[..., int]] = {
    "center": _padded,
    "indent": _indented,
    "replace": _replaced,
}
"""The same for filters."""
