"""Finding the name that was meant: one typing slip always, more slips in longer names."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.85) -> str | None:
    """The known name that `name` is a misspelling of, or None. A higher `cutoff` (0 to 1) finds less."""
    plain = name.strip().lower().replace("-", "_")
    candidates = list(known)
    for candidate in candidates:
        if one_slip(plain, candidate.lower()):
            return candidate
    close = difflib.get_close_matches(plain, candidates, n=1, cutoff=cutoff)
    return close[0] if close else None


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is wrong in any case: the known name nearest to it, if any."""
    near = nearest(name, known, cutoff=0.6)
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
