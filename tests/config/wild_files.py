"""The files of tests/data/config/wild with stand-ins for the models, folders and files that they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

WILD = Path(__file__).resolve().parents[1] / "data/config/wild"
MODELS = ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae", "flux1_clip_l", "flux1_t5xxl")
TINY = "polyrank/tiny-flux"


def with_paths(text: str, stand_in: Callable[[str, str], str | None]) -> str:
    """TOML text with each text value replaced by what `stand_in(key, value)` gives, if not None.

    Everything else stays as it is written: order, comments, blanks, line ends. Values left blank stay blank.
    """

    def replaced(match: re.Match[str]) -> str:
        value = match["value"][1:-1]
        new = stand_in(match["key"], value) if value else None
        return match[0] if new is None else f"{match['head']}'{new}'"

    return re.sub(
        r"^(?P<head>[ \t]*(?P<key>\w+)[ \t]*=[ \t]*)(?P<value>\"[^\"\n]*\"|'[^'\n]*')",
        replaced,
        text,
        flags=re.M,
    )


def script_words(text: str) -> list[str]:
    """The words after flux_train_network.py of a command line for a Unix shell or, with ^, for Windows."""
    batch = "^\n" in text
    lines = text.strip().rstrip("\\").replace("^\n" if batch else "\\\n", " ")
    splitter = shlex.shlex(lines, posix=True, punctuation_chars=False)
    splitter.whitespace_split, splitter.commenters = True, ""
    if batch:
        splitter.escape = ""  # a backslash is a backslash
    words = list(splitter)
    start = next(i for i, word in enumerate(words) if word.endswith("flux_train_network.py"))
    return words[start + 1 :]


def without_options(words: list[str], *names: str) -> list[str]:
    """The words without these options and their values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0] in names
        if not dropping:
            kept.append(word)
    return kept
