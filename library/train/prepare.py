"""What can be known, checked and told before anything large is read: model files by their headers, data, plan."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from library.config.dataset_settings import DatasetSettings
from library.config.datasets import resolve_datasets
from library.config.notices import Notices
from library.config.sections.memory import MemoryConfig
from library.config.sections.model import ModelConfig
from library.config.train_config import TrainConfig
from library.data.captions import PLACEHOLDER, holds, moves_tags
from library.data.dataset import TrainingData, place_records
from library.data.discover import Discovered, discover
from library.data.plan import Plan, PlanSettings, units_per_step
from library.data.problems import shown
from library.data.records import ImageRecord
from library.errors import ConfigError
from library.models import identify
from library.models.block_swap import SwapPlan
from library.models.identify import Part
from library.models.locate import locate
from library.models.params import FluxParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the four models and the tokenizers are; every file was looked at and is what its option says."""

    transformer: Path
    autoencoder: Path
    clip_l: Path
    t5: Path
    tokenizers: Path | None  # tokenizer_cache_dir
    parts: Mapping[str, Part]  # what the headers say, by kind

    @property
    def is_dev(self) -> bool:
        """Whether the transformer embeds guidance (dev); without, it is schnell."""
        params = self.parts["flux"].params()
        assert isinstance(params, FluxParams)
        return params.guidance_embed


@dataclass(frozen=True, slots=True)
class Data:
    """What is trained on, in which order, and what is held back."""

    datasets: tuple[DatasetSettings, ...]
    discovered: Discovered
    training: TrainingData
    plan: Plan
    validation: TrainingData | None
    validation_plan: Plan | None
    notices: tuple[str, ...]


def locate_models(config: ModelConfig) -> ModelFiles:
    """Find and identify the model files. CheckpointError in one sentence for a missing or wrong one."""
    base = config.pretrained_model_name_or_path
    assert base is not None, "checked by the config rules"
    paths: dict[str, Path] = {}
    parts: dict[str, Part] = {}
    for kind, option, reference in (
        ("flux", "pretrained_model_name_or_path", base),
        ("ae", "ae", config.ae or base),
        ("clip_l", "clip_l", config.clip_l or base),
        ("t5xxl", "t5xxl", config.t5xxl or base),
    ):
        paths[kind] = locate(reference, kind, option)
        parts[kind] = identify.require(paths[kind], kind, option)
    tokenizers = config.tokenizer_cache_dir
    return ModelFiles(
        transformer=paths["flux"],
        autoencoder=paths["ae"],
        clip_l=paths["clip_l"],
        t5=paths["t5xxl"],
        tokenizers=locate(str(tokenizers), "tokenizers", "tokenizer_cache_dir") if tokenizers else None,
        parts=parts,
    )


def check_swap(config: MemoryConfig, files: ModelFiles) -> None:
    """ConfigError when the transformer has too few blocks for blocks_to_swap."""
    params = files.parts["flux"].params()
    assert isinstance(params, FluxParams)
    SwapPlan.of(params, config.blocks_to_swap or 0)


def read_data(config: TrainConfig, *, seed: int, world_size: int) -> Data:
    """Read folders and captions, assign buckets, plan the run. The same on every rank."""
    notices = Notices()
    datasets = resolve_datasets(config, notices=notices)
    with no_garbage_collection():
        found = discover(datasets, seed=seed)
        training = _training_data(datasets, found.records, seed=seed)
        planned = training.planned_images()
    plan = Plan(planned, _plan_settings(config, datasets, seed=seed, world_size=world_size))
    training = replace(training, max_train_steps=plan.total_steps)
    validation = validation_plan = None
    if found.validation:
        still = tuple(_without_chance(dataset) for dataset in datasets)
        validation = _training_data(still, found.validation, seed=_validation_seed(config, seed))
        validation_plan = _validation_plan(config, validation, world_size=world_size)
    else:
        _judges_nothing(config)
    for aside in found.asides:
        logger.info(aside)
    said = (*notices.all(), *found.notices, *_trigger_notices(datasets, found))
    return Data(datasets, found, training, plan, validation, validation_plan, said)


def _judges_nothing(config: TrainConfig) -> None:
    """Refuse what goes by the validation loss, where there will be none."""
    for name in ("keep_best", "early_stop_patience"):
        if config.value(name):
            raise ConfigError(
                f"{name} goes by the validation loss, and no image is kept for validation: set validation_split, "
                f"such as 0.1, or leave {name} out"
            )


def _trigger_notices(datasets: Sequence[DatasetSettings], found: Discovered) -> Iterator[str]:
    """Where only some captions of a subset have the trigger word, or [trigger] stands for nothing: oversights,
    perhaps.
    """
    by_subset: dict[tuple[int, int], list[ImageRecord]] = {}
    for record in found.records:
        by_subset.setdefault((record.dataset, record.subset), []).append(record)
    for report in found.subsets:
        trigger = datasets[report.dataset].subsets[report.subset].trigger_word
        records = by_subset.get((report.dataset, report.subset), [])
        if trigger:
            odd = [r for r in records if not holds(r.caption.replace(PLACEHOLDER, trigger), trigger)]
            said = f"lack the trigger word {trigger!r} and get it put first"
        else:
            odd = [r for r in records if PLACEHOLDER in r.caption]
            said = f"have {PLACEHOLDER} and keep it as it is, since there is no trigger_word for them"
        if odd and (not trigger or len(odd) < len(records)):
            names = shown([record.path.name for record in odd])
            yield f"{report.name}: {len(odd)} of {len(records)} captions {said}: {names}"


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For making many objects that stay: looking through them for garbage would take a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _training_data(
    datasets: Sequence[DatasetSettings], records: Sequence[ImageRecord], *, seed: int
) -> TrainingData:
    return TrainingData(
        datasets=tuple(datasets),
        records=tuple(records),
        placements=place_records(datasets, records),
        seed=seed,
    )


def _plan_settings(
    config: TrainConfig, datasets: Sequence[DatasetSettings], *, seed: int, world_size: int
) -> PlanSettings:
    batch_sizes = tuple(dataset.batch_size for dataset in datasets)
    training = config.training
    return PlanSettings(
        seed=seed,
        batch_sizes=batch_sizes,
        units_per_step=units_per_step(
            batch_sizes,
            world=world_size,
            accumulation=training.gradient_accumulation_steps,
            global_batch_size=training.global_batch_size,
        ),
        max_train_steps=None if training.max_train_epochs else training.max_train_steps,
        max_train_epochs=training.max_train_epochs,
    )


def _validation_seed(config: TrainConfig, seed: int) -> int:
    chosen = config.validation.validation_seed
    return seed if chosen is None else chosen


def _validation_plan(config: TrainConfig, data: TrainingData, *, world_size: int) -> Plan:
    """One pass over the validation images, or the first max_validation_steps batches of it."""
    settings = PlanSettings(
        seed=data.seed,
        batch_sizes=tuple(dataset.batch_size for dataset in data.datasets),
        units_per_step=world_size,
        max_train_epochs=1,
    )
    plan = Plan(data.planned_images(), settings)
    most = config.validation.max_validation_steps
    if most is None or most >= plan.steps_per_epoch:
        return plan
    return Plan(plan.images, replace(settings, max_train_epochs=None, max_train_steps=most))


def _without_chance(dataset: DatasetSettings) -> DatasetSettings:
    """A dataset whose samples look the same in every visit, so that two validation losses can be compared."""
    calm: dict[str, Any] = {
        "shuffle_caption": False, "caption_dropout_rate": 0.0, "caption_dropout_every_n_epochs": 0,
        "caption_tag_dropout_rate": 0.0, "token_warmup_step": 0.0, "color_aug": False, "flip_aug": False,
        "random_crop": False,
    }  # fmt: skip
    subsets = (replace(subset, rejoin_tags=moves_tags(subset), **calm) for subset in dataset.subsets)
    return replace(dataset, subsets=tuple(subsets))


def start_step(config: TrainConfig, plan: Plan) -> int:
    """Where a run that resumes nothing begins: `initial_step`, or the start of `initial_epoch`."""
    saving = config.saving
    step = saving.initial_step or 0
    if not step and saving.initial_epoch:
        step = (saving.initial_epoch - 1) * plan.steps_per_epoch
    if step >= plan.total_steps:
        raise ConfigError(
            f"the run would start at step {step}, but has only {plan.total_steps}; "
            "raise max_train_steps or max_train_epochs, or lower initial_step or initial_epoch"
        )
    return step


def trains_text(config: TrainConfig) -> bool:
    """Whether a text encoder is trained: not if its learning rates are all 0."""
    rates = config.optimizer.text_encoder_lr
    return not config.network.network_train_unet_only and (not rates or any(rate > 0 for rate in rates))
