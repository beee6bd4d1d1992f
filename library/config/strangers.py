"""Placing the keys of a config file that are no options: see `foreign` for what is known of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from library.config.cli import Given
from library.config.foreign import (
    ALIASES,
    DATASET_TABLES,
    NETWORK_ARGUMENTS,
    OLD_SWAP_KEYS,
    WITHOUT_EFFECT,
    NetworkArgument,
)
from library.config.kinds import FALSE_WORDS, is_unset, to_int
from library.config.names import did_you_mean, nearest
from library.config.notices import Notices
from library.config.options import UNSET
from library.config.train_config import OPTIONS
from library.errors import ConfigError

IGNORED = "Kohya's trainer ignores it"


@dataclass(slots=True)
class Placing:
    """The options so far, and what is to be said about the strangers."""

    given: dict[str, Given]
    notices: Notices
    arguments: dict[str, str] = field(default_factory=dict)  # key=value for network_args -> its place
    idle: dict[str, list[str]] = field(default_factory=dict)  # reason -> keys without effect
    unknown: list[str] = field(default_factory=list)  # "key (place)"

    def value(self, name: str) -> object:
        """The value given for the option, UNSET if there is none. Raises ConfigError for a wrong one."""
        return (
            OPTIONS[name].read(self.given[name].raw, self.given[name].place) if name in self.given else UNSET
        )

    def has(self, name: str) -> bool:
        """Whether the option is given and not left blank."""
        return self.value(name) is not UNSET

    def ignore(self, key: str, reason: str) -> None:
        """Remember that `key` has no effect."""
        self.idle.setdefault(reason, []).append(key)

    @property
    def network_args(self) -> tuple[str, ...]:
        """The given network_args."""
        return cast("tuple[str, ...]", self.value("network_args")) if self.has("network_args") else ()


def place_strangers(strangers: Mapping[str, Given], given: dict[str, Given], notices: Notices) -> None:
    """Give each stranger its meaning, in `given`, or say that it has none.

    `given` holds the options of file and command line, and wins. Raises ConfigError for a misspelt option.
    """
    placing = Placing(given, notices)
    _place_old_swap_keys(strangers, placing)
    for key, value in strangers.items():
        if key in ALIASES:
            _place_alias(key, value, placing)
        elif key in NETWORK_ARGUMENTS:
            _place_argument(key, value, strangers, placing)
        elif key in WITHOUT_EFFECT:
            placing.ignore(key, WITHOUT_EFFECT[key])
        elif key not in OLD_SWAP_KEYS:
            _place_unknown(key, value, placing)
    _add_arguments(placing)
    if placing.idle:
        listed = "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in placing.idle.items())
        notices.remarks.append(f"Keys without effect here: {listed}")
    if placing.unknown:
        notices.remarks.append("Ignored keys, which are no options: " + ", ".join(placing.unknown))


def _place_alias(key: str, value: Given, placing: Placing) -> None:
    alias = ALIASES[key]
    if is_unset(value.raw):
        return
    if rival := next((name for name in (alias.option, *alias.unless) if placing.has(name)), None):
        placing.ignore(key, f"{rival} is given")
    elif alias.needs and not any(placing.has(name) for name in alias.needs):
        placing.ignore(key, alias.otherwise)
    else:
        placing.given[alias.option] = Given(
            f"{value.raw}{alias.unit}" if alias.unit else value.raw, value.place
        )
        placing.notices.remarks.append(f"{value.place}: {key} is taken as {alias.option}; {IGNORED}")


def _place_old_swap_keys(strangers: Mapping[str, Given], placing: Placing) -> None:
    """The sum of both kinds of blocks becomes blocks_to_swap."""
    old = {key: value for key, value in strangers.items() if key in OLD_SWAP_KEYS and not is_unset(value.raw)}
    blocks = math.ceil(sum(OLD_SWAP_KEYS[key] * _whole_number(key, value) for key, value in old.items()))
    if placing.has("blocks_to_swap"):
        for key in old:
            placing.ignore(key, "blocks_to_swap is given")
    elif blocks:
        place = next(iter(old.values())).place
        placing.given["blocks_to_swap"] = Given(blocks, place)
        written = " and ".join(f"{key} = {value.raw}" for key, value in old.items())
        placing.notices.remarks.append(
            f"{place}: {written}, an old form, is taken as blocks_to_swap = {blocks}"
        )


def _whole_number(key: str, value: Given) -> int:
    try:
        return to_int(value.raw)
    except ValueError as error:
        raise ConfigError(f"{value.place}: {key} = {value.raw!r} {error}") from None


def _place_argument(key: str, value: Given, strangers: Mapping[str, Given], placing: Placing) -> None:
    argument = NETWORK_ARGUMENTS[key]
    switch = strangers.get(argument.switch)
    if is_unset(value.raw) or value.raw in argument.unset:
        return
    if not str(placing.value("network_module")).startswith(argument.modules):
        placing.ignore(key, f"it is an argument of {' and '.join(_named(argument))}")
    elif switch and str(switch.raw).lower() in FALSE_WORDS:
        placing.ignore(key, f"{argument.switch} is off")
    elif argument.name in {text.partition("=")[0].strip() for text in placing.network_args}:
        placing.ignore(key, f"network_args has {argument.name}")
    else:
        written = ",".join(map(str, value.raw)) if isinstance(value.raw, list) else str(value.raw)
        placing.arguments[f"{argument.name}={written}"] = value.place


def _named(argument: NetworkArgument) -> list[str]:
    return [module + "kohya" if module.endswith(".") else module for module in argument.modules]


def _add_arguments(placing: Placing) -> None:
    if not placing.arguments:
        return
    present = placing.network_args
    place = placing.given["network_args"].place if present else next(iter(placing.arguments.values()))
    placing.given["network_args"] = Given([*present, *placing.arguments], place)
    placing.notices.remarks.append(
        f"Taken as network_args, where Kohya's trainer expects them: {' '.join(placing.arguments)}"
    )


def _place_unknown(key: str, value: Given, placing: Placing) -> None:
    if key in DATASET_TABLES and isinstance(value.raw, list):
        raise ConfigError(
            f"{value.place}: {key} describes datasets; put its tables into a file of their own, "
            "[[datasets]] with [[datasets.subsets]], and name that as dataset_config"
        )
    inner = [name for name in value.raw if name in OPTIONS] if isinstance(value.raw, dict) else []
    if inner:
        raise ConfigError(
            f"{value.place}: the table {key} stands inside another one, so {', '.join(inner)} would not be "
            f"read; write it as [{key}]"
        )
    if near := nearest(key, OPTIONS):
        raise ConfigError(f"{value.place}: unknown option {key!r}{did_you_mean(near)}")
    placing.unknown.append(f"{key} ({value.place})")
