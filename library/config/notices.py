"""What is said about a config that can be used: remarks on what was ignored or changed, and advice."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Notices:
    """Collected while a config is read. Only remarks become errors under `strict_config`."""

    remarks: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def all(self) -> tuple[str, ...]:
        """Every sentence once, remarks first."""
        return tuple(dict.fromkeys([*self.remarks, *self.advice]))
