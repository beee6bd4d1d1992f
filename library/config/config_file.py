"""The TOML file of options: all tables flattened one level, as Kohya reads it, and every key accounted for.

A key that is no option is an alias, known to be without effect, a likely misspelling (an error), or listed as
ignored. Values are not converted here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from library.config.cli import Given
from library.config.foreign import ALIASES, DATASET_TABLES, OLD_SWAP_KEYS, WITHOUT_EFFECT
from library.config.kinds import is_unset, to_int
from library.config.names import nearest
from library.config.notices import Notices
from library.config.options import shown
from library.config.toml_file import key_lines, parse_toml, read_text
from library.config.train_config import OPTIONS
from library.errors import ConfigError

OTHER_PROGRAMS = (".json", ".yaml", ".yml")


def config_path(name: str) -> Path:
    """The file that --config_file names; `.toml` may be left out. Files of other programs have other endings."""
    path = Path(name).expanduser()
    if path.suffix.lower() in OTHER_PROGRAMS or name.endswith(".toml"):
        return path
    with_suffix = path.with_name(f"{path.name}.toml")
    return path if path.is_file() and not with_suffix.exists() else with_suffix


def read_config_file(path: Path, notices: Notices) -> dict[str, Given]:
    """What the file gives for each option, in file order; a later value replaces an earlier one.

    Raises ConfigError for a missing or broken file and for a misspelt key.
    """
    text = read_text(path)
    given: dict[str, Given] = {}
    strangers: dict[str, Given] = {}
    for key, value in _entries(parse_toml(text, path), key_lines(text), path.name):
        target = given if key in OPTIONS else strangers
        if key in target and target[key].raw != value.raw:
            earlier = f"{shown(key, target[key].raw)} ({target[key].place})"
            notices.remarks.append(
                f"{key} is given twice: {earlier}, then {shown(key, value.raw)} ({value.place}), which counts"
            )
        target[key] = value
    _place_strangers(strangers, given, notices)
    return given


def _entries(
    tables: dict[str, Any], lines: dict[tuple[str, str], list[int]], file: str
) -> Iterator[tuple[str, Given]]:
    """Each key with its value and place, tables dissolved one level."""
    for name, value in tables.items():
        inner = value.items() if isinstance(value, dict) else [(name, value)]
        table = name if isinstance(value, dict) else ""
        for key, entry in inner:
            section = f" [{table}]" if table else ""
            numbers = lines.get((table, key), [])
            line = f" line {numbers[0]}" if numbers else ""
            yield key, Given(entry, f"{file}{section}{line}")


def _place_old_swap_keys(strangers: dict[str, Given], given: dict[str, Given], notices: Notices) -> list[str]:
    """Take the keys from before blocks_to_swap out of `strangers`, and give that; what has no effect is returned."""
    old = {key: strangers.pop(key) for key in OLD_SWAP_KEYS if key in strangers}
    old = {key: value for key, value in old.items() if not is_unset(value.raw)}
    if not old:
        return []
    if "blocks_to_swap" in given:
        return [f"{key} (blocks_to_swap is given)" for key in old]
    steps = math.ceil(sum(OLD_SWAP_KEYS[key] * _whole_number(key, value) for key, value in old.items()))
    place = next(iter(old.values())).place
    given["blocks_to_swap"] = Given(steps, place)
    said = " and ".join(f"{key} = {value.raw}" for key, value in old.items())
    notices.remarks.append(f"{place}: {said}, an old form, is taken as blocks_to_swap = {steps}")
    return []


def _whole_number(key: str, value: Given) -> int:
    try:
        return to_int(value.raw)
    except ValueError as error:
        raise ConfigError(f"{value.place}: {key} = {value.raw!r} {error}") from None


def _place_strangers(strangers: dict[str, Given], given: dict[str, Given], notices: Notices) -> None:
    """Sort the keys that are no options; aliases go into `given`."""
    without_effect = _place_old_swap_keys(strangers, given, notices)
    ignored: list[str] = []
    for key, value in strangers.items():
        if key in DATASET_TABLES and isinstance(value.raw, list):
            raise ConfigError(
                f"{value.place}: {key} describes datasets; put its tables into a file of their own, "
                "[[datasets]] with [[datasets.subsets]], and name that as dataset_config"
            )
        alias = ALIASES.get(key)
        rival = (
            next((name for name in (alias.option, *alias.unless) if name in given), None) if alias else None
        )
        if alias and rival is None:
            given[alias.option] = value
            notices.remarks.append(
                f"{value.place}: {key} is taken as {alias.option}; Kohya's trainer ignores it"
            )
        elif rival:
            without_effect.append(f"{key} ({rival} is given)")
        elif key in WITHOUT_EFFECT:
            without_effect.append(f"{key} ({WITHOUT_EFFECT[key]})")
        elif near := nearest(key, OPTIONS):
            raise ConfigError(f"{value.place}: unknown option {key!r}; did you mean {near!r}?")
        else:
            ignored.append(f"{key} ({value.place})")
    if without_effect:
        notices.remarks.append("Keys without effect here: " + ", ".join(without_effect))
    if ignored:
        notices.remarks.append("Ignored keys, which are no options: " + ", ".join(ignored))
