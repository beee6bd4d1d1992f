"""Numbers and times in words, for tables and for the lines at the start of a run."""

from __future__ import annotations

from collections.abc import Sequence

from library.preflight.facts import FileFacts

MOST_LETTERS = 60  # of a caption


def size_text(count: int) -> str:
    """Bytes: "1.3 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def count_text(number: int, one: str, many: str = "") -> str:
    """A number with its noun: "1 prompt", "2 prompts"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def names_text(names: Sequence[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def steps_text(steps: Sequence[int]) -> str:
    """The first few, the last, and how many there are."""
    if len(steps) <= 7:
        return ", ".join(map(str, steps))
    return f"{', '.join(map(str, steps[:4]))} ... {steps[-1]} ({len(steps)} times)"


def moment_text(file: FileFacts) -> str:
    """When a file is written and how long it stays."""
    if not file.step:
        return "before the first step"
    when = f"step {file.step}" if file.epoch is None else f"epoch {file.epoch}, step {file.step}"
    return when if file.removed_at is None else f"{when}, kept until step {file.removed_at}"


def short_text(text: str) -> str:
    """The first line of a caption, not too long."""
    line = text.split("\n", 1)[0]
    return line if len(line) <= MOST_LETTERS else line[: MOST_LETTERS - 3] + "..."
