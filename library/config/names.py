"""Finding the name that was meant: one typing slip always, more slips in longer names."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` is a misspelling of, or None when there is none near."""
    plain = name.strip().lower().replace("-", "_")
    candidates = list(known)
    for candidate in candidates:
        if one_slip(plain, candidate.lower()):
            return candidate
    close = difflib.get_close_matches(plain, candidates, n=1, cutoff=0.85)
    return close[0] if close else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?", or nothing when no known name is near."""
    near = nearest(name, known)
    return f"; did you mean {near!r}?" if near else ""


def one_slip(left: str, right: str) -> bool:
    """Whether one letter added, left out, replaced or swapped with its neighbour makes `right` of `left`."""
    left, right = _without_common_start(left, right)
    left, right = _without_common_start(left[::-1], right[::-1])
    swapped = len(left) == 2 and left == right[::-1]
    return swapped or max(len(left), len(right)) <= 1


def _without_common_start(left: str, right: str) -> tuple[str, str]:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    length = sum(1 for _ in pairs)
    return left[length:], right[length:]
