"""What comes out of reading the options: the config, what there is to say about it, where its values come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from library.config.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A checked config, what there is to say about it, and where each option's value comes from.

    A source is "default", "command line", "train.toml [section] line 7" or "implied by <option>".
    """

    config: TrainConfig
    notices: tuple[str, ...]
    sources: Mapping[str, str]
