"""TrainConfig: all sections as one frozen value, and OPTIONS: the table made of their fields.

A reader takes the section it needs, never the whole. Reading is in `load`, checks are in `rules`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

from library.config.options import Option, table
from library.config.sections.averaging import AveragingConfig
from library.config.sections.caching import CachingConfig
from library.config.sections.dataset import DatasetConfig
from library.config.sections.distributed import DistributedConfig
from library.config.sections.logging import LoggingConfig
from library.config.sections.memory import MemoryConfig
from library.config.sections.metadata import MetadataConfig
from library.config.sections.model import ModelConfig
from library.config.sections.network import NetworkConfig
from library.config.sections.objective import ObjectiveConfig
from library.config.sections.optimizer import OptimizerConfig
from library.config.sections.other import OtherFamilyConfig
from library.config.sections.run import RunConfig
from library.config.sections.sampling import SamplingConfig
from library.config.sections.saving import SavingConfig
from library.config.sections.schedule import ScheduleConfig
from library.config.sections.training import TrainingConfig
from library.config.sections.validation import ValidationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Every option of a run, by section. `TrainConfig()` has Kohya's defaults."""

    model: ModelConfig = field(default_factory=ModelConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    caching: CachingConfig = field(default_factory=CachingConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    averaging: AveragingConfig = field(default_factory=AveragingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    saving: SavingConfig = field(default_factory=SavingConfig)
    metadata: MetadataConfig = field(default_factory=MetadataConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    other: OtherFamilyConfig = field(default_factory=OtherFamilyConfig)
    run: RunConfig = field(default_factory=RunConfig)
    # What another program's config says of the data, as the content of a dataset_config file; no option.
    dataset_tables: Mapping[str, object] | None = None

    @classmethod
    def from_values(
        cls, values: Mapping[str, object], *, dataset_tables: Mapping[str, object] | None = None
    ) -> TrainConfig:
        """The config with these options, by flat name and of the right types; defaults for the rest."""
        by_section: dict[str, dict[str, object]] = {name: {} for name in SECTIONS}
        for name, value in values.items():
            by_section[OPTIONS[name].section][name] = value
        sections = {name: section(**by_section[name]) for name, section in SECTIONS.items()}
        return cls(**sections, dataset_tables=dataset_tables)

    def flat(self) -> dict[str, object]:
        """All options by their flat names, as Kohya's namespace has them."""
        return {name: self.value(name) for name in OPTIONS}

    def value(self, name: str) -> object:
        """The value of the option `name`."""
        return getattr(getattr(self, OPTIONS[name].section), name)


SECTIONS: Mapping[str, type] = MappingProxyType(
    {
        item.name: cast(type, item.default_factory)
        for item in dataclasses.fields(TrainConfig)
        if item.name != "dataset_tables"
    }
)
OPTIONS: Mapping[str, Option] = MappingProxyType(table(SECTIONS.items()))
