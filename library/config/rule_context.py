"""What a rule over options looks at, and how it names an option in a message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from library.config.notices import Notices
from library.config.options import COMMAND_LINE, shown
from library.config.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class Context:
    """The options, where they come from, and where to put what there is to say."""

    config: TrainConfig
    sources: Mapping[str, str]
    notices: Notices

    def given(self, name: str) -> bool:
        """Whether the option was written somewhere, or follows from one that was."""
        return self.sources.get(name, "default") != "default"

    def said(self, name: str) -> str:
        """The option, its value and where it comes from, for a message."""
        place = self.sources.get(name, "default")
        value = self.config.value(name)
        text = str(value) if isinstance(value, Path) else shown(name, value)
        if value is True and place == COMMAND_LINE:
            return f"--{name} ({place})"
        return f"--{name} {text} ({place})" if place == COMMAND_LINE else f"{name} = {text} ({place})"

    def advise(self, code: str, text: str) -> None:
        """Add one piece of advice; `code` is a key of `advice.MEANINGS`."""
        self.notices.advise(code, text)
