"""What is wrong with the training data, gathered so that one message can list it all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from library.errors import DatasetError

SHOWN = 5  # problems, or names, spelled out in a message


@dataclass(slots=True)
class Problems:
    """Everything found wrong so far, each as (path, what), once."""

    items: dict[tuple[Path, str], None] = field(default_factory=dict)

    def add(self, path: Path, what: str) -> None:
        """Note one problem."""
        self.items[path, what] = None

    def check(self) -> None:
        """Raise DatasetError with the first few problems if there is any."""
        if not self.items:
            return
        listed = ", ".join(f"{path} {what}" for path, what in list(self.items)[:SHOWN])
        rest = len(self.items) - SHOWN
        more = f", and {rest} more" if rest > 0 else ""
        number = "one problem" if len(self.items) == 1 else f"{len(self.items)} problems"
        raise DatasetError(f"the training data has {number}: {listed}{more}; correct or remove them")


def shown(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    listed = ", ".join(names[:SHOWN])
    return listed + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
