"""Finding the name that was meant: one typing slip always, more slips in longer names."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.85) -> tuple[str, ...]:
    """The known names that `name` may be a misspelling of: all that are one slip away, else the closest.

    Empty if none is close. A higher `cutoff` (0 to 1) finds less.
    """
    plain = name.strip().lower().replace("-", "_")
    candidates = list(known)
    if plain in candidates:
        return (plain,)
    slips = tuple(candidate for candidate in candidates if one_slip(plain, candidate.lower()))
    return slips or tuple(difflib.get_close_matches(plain, candidates, n=1, cutoff=cutoff))


def did_you_mean(names: Iterable[str]) -> str:
    """The end of a message about a wrong name, or "" where no name is near."""
    listed = " or ".join(repr(name) for name in names)
    return f"; did you mean {listed}?" if listed else ""


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is wrong in any case: the known names nearest to it, if any."""
    return did_you_mean(nearest(name, known, cutoff=0.6))


def files_near(path: Path) -> str:
    """The end of a message about a file that is missing: what is there instead."""
    folder = path.parent
    try:
        names = sorted(one.name for one in folder.iterdir() if one.is_file() and one.suffix == path.suffix)
    except OSError:
        return f", and no folder {folder}"
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return did_you_mean(near) or (f"; the folder has {', '.join(names[:5])}" if names else "")


def one_slip(left: str, right: str) -> bool:
    """Whether one letter added, left out, replaced or swapped with its neighbour makes `right` of `left`."""
    if abs(len(left) - len(right)) > 1:
        return False
    left, right = _without_common_start(left, right)
    left, right = _without_common_start(left[::-1], right[::-1])
    swapped = len(left) == 2 and left == right[::-1]
    return swapped or max(len(left), len(right)) <= 1


def _without_common_start(left: str, right: str) -> tuple[str, str]:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False))
    length = sum(1 for _ in pairs)
    return left[length:], right[length:]
