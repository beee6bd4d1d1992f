"""What is said about a config that can be used: remarks on what was ignored or changed, and advice.

A piece of advice is a sentence that begins with its code in brackets, `[flux-guidance] guidance_scale ...`, by which
it is looked up in docs/advice.md and silenced with --ignore_advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from library.config.advice import MEANINGS
from library.errors import ConfigError

_CODE = re.compile(r"\[([a-z0-9-]+)\] ")


@dataclass(slots=True)
class Notices:
    """Collected while a config is read. `ignored` are codes of advice that is not wanted."""

    remarks: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    ignored: frozenset[str] = frozenset()

    def advise(self, code: str, text: str) -> None:
        """Add a piece of advice unless its code is ignored."""
        assert code in MEANINGS, f"{code} is not explained in library/config/advice.py"
        if code not in self.ignored:
            self.advice.append(f"[{code}] {text}")

    def all(self) -> tuple[str, ...]:
        """Every sentence once, remarks first."""
        return tuple(dict.fromkeys([*self.remarks, *self.advice]))


def code_of(notice: str) -> str | None:
    """The code that a piece of advice begins with; None for a remark."""
    match = _CODE.match(notice)
    return match[1] if match else None


def refuse(notices: Iterable[str]) -> None:
    """What strict_config does with anything there is to say. Raises ConfigError listing it."""
    listed = list(notices)
    if listed:
        raise ConfigError("strict_config allows none of this: " + "; ".join(listed))
