"""One option is one field of a section dataclass, declared by `option()`: flag, key and checks come from it.

Names, types and defaults are those of Kohya's FLUX LoRA trainer unless a row is marked `ours`. A row says
what this version does with it: it is used, accepted without effect, or refused, and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from library.config.kinds import KINDS, Kind, is_unset
from library.config.names import suggestion
from library.errors import ConfigError

COMMAND_LINE = "command line"
SECRETS = frozenset({"wandb_api_key", "huggingface_token"})
UNSET: Final = object()  # what reading gives for a value that stands for "not given"


@dataclass(frozen=True, slots=True)
class Effect:
    """What this version does with an option. `quiet`: no effect because it asks for what holds anyway."""

    state: Literal["used", "none", "refused"] = "used"
    reason: str = ""
    quiet: bool = False
    refused_values: Mapping[str, str] = field(default_factory=dict)  # value -> what to do instead


USED = Effect()


def no_effect(reason: str, *, quiet: bool = False) -> Effect:
    """Accepted, does nothing; `reason` is shown when the option is given."""
    return Effect("none", reason, quiet)


def refused(reason: str) -> Effect:
    """An error when given with another value than its default; `reason` says what to do instead."""
    return Effect("refused", reason)


def refused_values(reasons: Mapping[str, str]) -> Effect:
    """Used, except for these values."""
    return Effect(refused_values=reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The numbers an option may have, and what they count."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        bounds = ((self.ge, ">="), (self.gt, ">"), (self.le, "<="))
        return " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)

    def allows(self, value: float) -> bool:
        """Whether `value` is within the bounds."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a declaration says besides name and type."""

    default: object
    help: str
    choices: tuple[str | int, ...] = ()
    limit: Limit = Limit()
    effect: Effect = USED
    unset: tuple[object, ...] = ()
    ours: bool = False


def option(
    default: object,
    text: str,
    *,
    choices: tuple[str | int, ...] = (),
    limit: Limit = Limit(),
    effect: Effect = USED,
    unset: tuple[object, ...] = (),
    ours: bool = False,
) -> Any:
    """Declare an option as a dataclass field. Values in `unset` mean "not given", as empty text does."""
    row = Row(default=default, help=text, choices=choices, limit=limit, effect=effect, unset=unset, ours=ours)
    return field(default=default, metadata={"row": row})


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One row of the table of options."""

    name: str
    section: str
    type: str  # the field's annotation without "| None": a key of KINDS
    row: Row

    @property
    def kind(self) -> Kind:
        """How its values are read."""
        return KINDS[self.type]

    def read(self, raw: object, place: str) -> object:
        """The value that `raw` stands for, words of the command line or a value of a file, or UNSET.

        Raises ConfigError, naming `place`, when it is of another type, out of range or not among the choices.
        """
        if is_unset(raw):
            return UNSET
        try:
            value = self.kind.convert(raw)
        except ValueError as error:
            raise ConfigError(f"{self.said(raw, place)} {error}") from None
        if value in self.row.unset:
            return UNSET
        if isinstance(value, str):
            value = next((one for one in self.row.choices if str(one).lower() == value.lower()), value)
        if self.row.choices and value not in self.row.choices:
            allowed = ", ".join(str(choice) for choice in self.row.choices)
            hint = suggestion(str(value), [str(choice) for choice in self.row.choices])
            raise ConfigError(f"{self.said(raw, place)} is not one of {allowed}{hint}")
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(self.row.limit.allows(n) for n in numbers if isinstance(n, (int, float))):
            raise ConfigError(f"{self.said(raw, place)} must be {self.row.limit}")
        return value

    def said(self, raw: object, place: str) -> str:
        """The option and its value in the words of the place it was given in."""
        if place != COMMAND_LINE or self.name in SECRETS:
            return f"{place}: {self.name} = {shown(self.name, raw)}"
        words = " ".join(str(word) for word in raw) if isinstance(raw, (list, tuple)) else raw
        return f"{place}: --{self.name}" + ("" if self.type == "bool" else f" {words}")


def shown(name: str, raw: object) -> str:
    """A given value for a message, as it would be written in a file; a secret is not shown."""
    return "***" if name in SECRETS and raw else repr(raw)


def table(sections: Iterable[tuple[str, type]]) -> dict[str, Option]:
    """All options of the section classes by name, in the order of declaration."""
    options: dict[str, Option] = {}
    for section, cls in sections:
        for item in dataclasses.fields(cls):
            assert item.name not in options, f"{item.name} is declared twice"
            kind = str(item.type).removesuffix(" | None")
            options[item.name] = Option(name=item.name, section=section, type=kind, row=item.metadata["row"])
    return options
