"""What becomes of one key of another program's config, and the collecting of it.

A source is a table from key to `Rule`. A rule either sets options by a converter, or is computed from several
keys by the source's own function, or drops the key and says why. Every key of a file ends in one `Note`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from library.config.options import UNSET
from library.config.train_config import OPTIONS
from library.errors import ConfigError

Convert = Callable[[Any], object]
Table = Mapping[str, "Rule"]
ARGUMENT = "network_args "  # stands before the name of a network argument in `Rule.to`
DATASET = "dataset "  # and this before the name of a key of a dataset table
ASSUMED = "(assumed)"  # stands for the key of what the other program does without being told
READ = "read"  # what became of a key that only tells what kind of config it is


@dataclass(frozen=True, slots=True)
class Rule:
    """`to` names what the key sets: options, "network_args x", "dataset x"."""

    to: tuple[str, ...]
    note: str = ""  # why it is dropped, or what differs
    convert: Convert | None = None  # None: several keys decide, in the source's function
    is_dropped: bool = False


def same(value: Any) -> object:
    """The value as it is."""
    return value


def option(name: str, convert: Convert = same, note: str = "") -> Rule:
    """The key is the option `name`."""
    return Rule((name,), note, convert)


def argument(name: str, convert: Convert = same, note: str = "") -> Rule:
    """The key is the network argument `name`."""
    return Rule((ARGUMENT + name,), note, convert)


def dataset(name: str, convert: Convert = same, note: str = "") -> Rule:
    """The key is the key `name` of a dataset table."""
    return Rule((DATASET + name,), note, convert)


def decides(*names: str, note: str = "") -> Rule:
    """The key decides `names` together with others."""
    return Rule(names, note)


def dropped(reason: str) -> Rule:
    """The key has no counterpart."""
    return Rule((), reason, is_dropped=True)


@dataclass(frozen=True, slots=True)
class Note:
    """What became of one key. `to` is "" for a dropped key; `is_off` marks a key that asked for nothing."""

    key: str
    value: object
    to: str
    text: str
    is_off: bool = False


@dataclass(frozen=True, slots=True)
class Imported:
    """A config of another program in our words: options as a TOML file would give them, and dataset tables."""

    kind: str  # the program, for messages
    options: Mapping[str, object]
    origins: Mapping[str, str]  # option -> the key it comes from
    dataset: Mapping[str, object] | None  # as the content of a dataset_config file
    notes: tuple[Note, ...]


@dataclass(slots=True)
class Draft:
    """An `Imported` in the making."""

    kind: str
    options: dict[str, object] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    arguments: dict[str, object] = field(default_factory=dict)  # network_args
    tables: list[dict[str, Any]] = field(default_factory=list)  # [[datasets]], each with its subsets
    notes: list[Note] = field(default_factory=list)
    waiting: dict[str, tuple[object, Rule]] = field(default_factory=dict)  # keys that decide with others
    given: dict[str, object] = field(default_factory=dict)  # keys as they were written

    def set(self, name: str, value: object, *, key: str, note: str = "") -> None:
        """Give an option the value of `key`. What this version refuses is dropped with its reason."""
        if name == "log_with" and value in ("wandb", "all") and importlib.util.find_spec("wandb") is None:
            value, note = "tensorboard", "the package wandb is not installed: pip install wandb"
        reason = _refusal(name, value)
        if reason:
            self.drop(key, value, reason)
            return
        self.options[name] = value
        self.origins[name] = key
        self.use(key, value, f"{name} = {shown(value)}", note)

    def argue(self, name: str, value: object, *, key: str, note: str = "") -> None:
        """The same for a network argument."""
        self.arguments[name] = value
        self.use(key, value, f"{ARGUMENT}{name}={shown(value)}", note)

    def use(self, key: str, value: object, to: str, note: str = "") -> None:
        """Note a key that went into something set elsewhere."""
        self.notes.append(Note(key, self.given.get(key, value), to, note))

    def assume(self, name: str, value: object, why: str) -> None:
        """Give an option the value that the other program has without being told, unless the file set it."""
        if name not in self.options:
            self.set(name, value, key=ASSUMED, note=why)

    def drop(self, key: str, value: object, reason: str, *, matters: bool = False) -> None:
        """Leave a key out. A value that asks for nothing is not worth a word, unless it `matters`."""
        self.notes.append(Note(key, value, "", reason, is_off(value) and not matters))

    def finish(self) -> Imported:
        """The result, network arguments written as Kohya has them, and each key noted."""
        noted = {note.key for note in self.notes}
        for key, (value, rule) in self.waiting.items():
            if key not in noted:
                self.use(key, value, ", ".join(rule.to) or READ)
        if self.arguments:
            self.options["network_args"] = [f"{name}={value}" for name, value in self.arguments.items()]
            self.origins.setdefault("network_args", "several keys")
        content = {"datasets": self.tables} if self.tables else None
        return Imported(self.kind, self.options, self.origins, content, tuple(self.notes))


def translate(draft: Draft, table: Table, given: Mapping[str, Any]) -> None:
    """Apply the rules that look at one key, and note dropped and unknown keys. Others are left to the source."""
    draft.given.update(given)
    for key, value in given.items():
        rule = table.get(key)
        if rule is None:
            draft.drop(key, value, f"unknown key: {draft.kind} has none of this name that is known here")
        elif rule.is_dropped:
            draft.drop(key, value, rule.note)
        elif is_blank(value):
            draft.drop(key, value, "not set")
        elif rule.convert is None or rule.to[0].startswith(DATASET):
            draft.waiting[key] = (value, rule)
        else:
            name, converted = rule.to[0], rule.convert(value)
            if name.startswith(ARGUMENT):
                draft.argue(name.removeprefix(ARGUMENT), converted, key=key, note=rule.note)
            else:
                draft.set(name, converted, key=key, note=rule.note)


def dataset_values(table: Table, given: Mapping[str, Any]) -> dict[str, object]:
    """The keys of a dataset table that the rules make of `given`."""
    values = {}
    for key, value in given.items():
        rule = table.get(key)
        if rule and rule.to and rule.to[0].startswith(DATASET) and rule.convert and not is_blank(value):
            values[rule.to[0].removeprefix(DATASET)] = rule.convert(value)
    return values


def note_dataset_keys(draft: Draft, table: Table, given: Mapping[str, Any], where: str) -> None:
    """Note what became of the keys of one dataset of the source."""
    for key, value in given.items():
        rule = table.get(key)
        name = f"{where}.{key}"
        if rule is None:
            draft.drop(name, value, f"unknown key: {draft.kind} has none of this name that is known here")
        elif rule.is_dropped or is_blank(value):
            draft.drop(name, value, rule.note if rule.is_dropped else "not set")
        else:
            # What a rule says of a key that decides with others is when it counts, not what differs.
            draft.use(name, value, ", ".join(rule.to) or READ, rule.note if rule.convert else "")


def is_blank(value: object) -> bool:
    """Whether a key is there without a value."""
    return value is None or (isinstance(value, str) and not value.strip()) or value in ([], {})


def is_off(value: object) -> bool:
    """Whether a value asks for nothing, so that dropping its key loses nothing."""
    return is_blank(value) or value in (False, 0, "false", "False", "no", "none")


def shown(value: object) -> str:
    """A value for a message, shortened."""
    text = value.replace("\n", " / ") if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refusal(name: str, value: object) -> str:
    """Why this version does not take the value, or "". One that cannot be read is complained of at loading."""
    known = OPTIONS[name]
    try:
        converted = known.read(value, "")
    except ConfigError:
        return ""
    effect = known.row.effect
    if converted is UNSET or converted == known.row.default:
        return ""
    return effect.refused_values.get(str(converted), effect.reason if effect.state == "refused" else "")
