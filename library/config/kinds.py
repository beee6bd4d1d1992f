"""The kinds of value an option can have, and how each is read from the command line or a file.

One converter serves both places, so "1e-4" is a number in a file too. Converters raise ValueError with the
end of a sentence ("is not a number"); the caller knows option and place. Unset values never get here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Prompts for sample images: the path of a prompt file, or the prompts themselves, one a line.
PromptText = str
# Number of GPUs; 0 is all of them.
GpuCount = int
# Number of transformer blocks, or "auto": as the memory at hand allows.
BlockCount = int | str
# A model file or folder, or a name that stands for one.
ModelName = str

TRUE_WORDS = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS = frozenset({"false", "0", "no", "off"})


def to_bool(raw: object) -> bool:
    """true or false; also 0 and 1 and the words that GUIs write."""
    word = str(raw).strip().lower()
    if isinstance(raw, (bool, int, str)) and word in TRUE_WORDS | FALSE_WORDS:
        return word in TRUE_WORDS
    raise ValueError("is not true or false")


def to_float(raw: object) -> float:
    """A finite number."""
    try:
        value = math.nan if isinstance(raw, bool) or not isinstance(raw, (int, float, str)) else float(raw)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError("is not a number")
    return value


def to_int(raw: object) -> int:
    """A whole number; 4.0 is one."""
    try:
        # Not by way of float alone: a 64-bit seed has more digits than a float keeps.
        return int(raw) if isinstance(raw, str) else _whole(to_float(raw), raw)
    except ValueError:
        pass
    try:
        return _whole(to_float(raw), raw)
    except ValueError:
        raise ValueError("is not a whole number") from None


def _whole(value: float, raw: object) -> int:
    if not value.is_integer():
        raise ValueError("is not a whole number")
    return raw if isinstance(raw, int) else int(value)


def to_text(raw: object) -> str:
    """Text as it is; a number is taken as it is written."""
    if isinstance(raw, str):
        return raw
    if isinstance(raw, (int, float)) and not isinstance(raw, bool):
        return str(raw)
    raise ValueError("is not text")


def to_model_name(raw: object) -> str:
    """A path or name. "C:\\train" in double quotes has a tab in it, which nobody means, and quotes that came
    along with "copy as path" are none of its letters.
    """
    text = to_text(raw)
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1]
    if any(ord(letter) < ord(" ") for letter in text):
        raise ValueError(
            "has a control character in it, as a backslash in double quotes is an escape: "
            "write the path with / or in single quotes"
        )
    return text


def to_path(raw: object) -> Path:
    """A local path; `~` is the home folder."""
    return local_path(to_model_name(raw))


def local_path(text: str) -> Path:
    """The path with `~` as the home folder; where `~name` is no user's, it is a name as any other."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def to_prompts(raw: object) -> str:
    """A prompt file's path or prompt text; a list is one prompt a line."""
    if isinstance(raw, (list, tuple)):
        return "\n".join(to_text(line) for line in raw)
    return to_text(raw)


def to_gpus(raw: object) -> int:
    """A number of GPUs; "all" is 0."""
    if isinstance(raw, str) and raw.strip().lower() == "all":
        return 0
    try:
        return to_int(raw)
    except ValueError:
        raise ValueError("is neither a number of GPUs nor all") from None


def to_blocks(raw: object) -> int | str:
    """A number of blocks, "auto" or "all"."""
    if isinstance(raw, str) and raw.strip().lower() in ("auto", "all"):
        return raw.strip().lower()
    try:
        return to_int(raw)
    except ValueError:
        raise ValueError("is neither a number of blocks nor auto nor all") from None


def to_steps(raw: object) -> int | float:
    """A number of steps, or a share of all steps: "10%" and numbers below 1 are shares, others are counts."""
    if isinstance(raw, str) and raw.strip().endswith("%"):
        share = to_float(raw.strip()[:-1]) / 100
        if share > 1:
            raise ValueError("is more than 100%")
        return share
    value = to_float(raw)
    return value if 0 < value < 1 else to_int(raw)


def to_resolution(raw: object) -> tuple[int, int]:
    """Width and height in pixels; one number is a square, and "1024x768" is as good as "1024,768"."""
    parts = _parts(raw.lower().replace("x", ",") if isinstance(raw, str) else raw)
    try:
        sides = [to_int(part) for part in parts]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError('is not a size in pixels such as 1024 or "1024,768"')
    return sides[0], sides[-1]


def to_range(raw: object) -> tuple[float, float]:
    """Two ascending numbers."""
    parts = _parts(raw)
    try:
        low, high = (to_float(part) for part in parts)
    except ValueError:
        low, high = 1.0, 0.0
    if low > high:
        raise ValueError('is not two ascending numbers such as "2.0,4.0"')
    return low, high


def to_texts(raw: object) -> tuple[str, ...]:
    """A list of texts, from a list, a table, or one string, split where the next `key=value` begins."""
    if isinstance(raw, dict):
        return tuple(f"{key}={value}" for key, value in raw.items())
    if isinstance(raw, str):
        return tuple(re.split(r"\s+(?=\w+=)", raw.strip()))
    return tuple(to_text(item) for item in _items(raw))


def to_paths(raw: object) -> tuple[Path, ...]:
    """A list of paths; one string is one path."""
    return tuple(to_path(item) for item in _items(raw))


def to_floats(raw: object) -> tuple[float, ...]:
    """A list of numbers; one number is a list of one, and a text is split at commas and blanks."""
    parts = [part for item in _items(raw) for part in (_words(item) if isinstance(item, str) else [item])]
    return tuple(to_float(part) for part in parts)


def to_table(raw: object) -> Mapping[str, object]:
    """A table of free form."""
    if isinstance(raw, dict):
        return dict(raw)  # plain, as it travels to worker processes
    raise ValueError("is not a table")


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _items(raw: object) -> tuple[object, ...]:
    return tuple(raw) if isinstance(raw, (list, tuple)) else (raw,)


def _parts(raw: object) -> tuple[object, ...]:
    return tuple(raw.split(",")) if isinstance(raw, str) else _items(raw)


@dataclass(frozen=True, slots=True)
class Kind:
    """How values of one type are read and shown in --help. `many`: takes any number of words."""

    convert: Callable[[object], object]
    metavar: str
    many: bool = False


# By the annotation of the field, without "| None".
KINDS = {
    "bool": Kind(to_bool, ""),
    "int": Kind(to_int, "N"),
    "GpuCount": Kind(to_gpus, "N|all"),
    "BlockCount": Kind(to_blocks, "N|auto|all"),
    "float": Kind(to_float, "X"),
    "int | float": Kind(to_steps, "STEPS|RATIO|%"),
    "str": Kind(to_text, "TEXT"),
    "PromptText": Kind(to_prompts, "FILE|TEXT"),
    "ModelName": Kind(to_model_name, "PATH|NAME"),
    "Path": Kind(to_path, "PATH"),
    "Mapping[str, object]": Kind(to_table, "TABLE"),
    "tuple[int, int]": Kind(to_resolution, "W[,H]"),
    "tuple[float, float]": Kind(to_range, "LOW,HIGH"),
    "tuple[str, ...]": Kind(to_texts, "KEY=VALUE", many=True),
    "tuple[Path, ...]": Kind(to_paths, "PATH", many=True),
    "tuple[float, ...]": Kind(to_floats, "X", many=True),
}


def is_unset(raw: object) -> bool:
    """Whether a given value means "not given": an empty text or list, as GUIs write for fields left blank."""
    return isinstance(raw, (str, list, tuple)) and not raw
