"""The model card of a run, written after each save with the pictures drawn last."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import library
from library.config.prompts import SamplePrompt
from library.config.train_config import TrainConfig
from library.errors import WriteFailed
from library.files.atomic import write_text
from library.files.model_card import DEV, MARK, SCHNELL, CardFacts, ShownPicture, card
from library.files.refusals import refusals_named
from library.models import tiny
from library.train.best import lowest
from library.train.naming import average_stem, best_stem, card_path, model_path, workflow_path
from library.train.saving import Saver
from library.train.scenes import STRENGTH, example_prompt
from library.train.state import TrainState
from library.train.trainer import StepReport
from library.train.trigger import trigger_words

if TYPE_CHECKING:
    from library.train.build import Job, Trained

logger = logging.getLogger(__name__)

Drawn = Sequence[tuple[SamplePrompt, Path]]
AVERAGE = "the average of the weights"


class CardListener:
    """Writes the card where something was saved; told after the pictures of the moment are drawn. Main rank only."""

    def __init__(
        self,
        *,
        path: Path,
        saver: Saver,
        pictures: Callable[[], Drawn],
        text: Callable[[TrainState, Drawn], str],
    ) -> None:
        self._path, self._saver, self._pictures, self._text = path, saver, pictures, text
        self._saves = 0

    def on_start(self, state: TrainState) -> TrainState:
        return state

    def wants_weights(self, step: int) -> bool:
        """Never: one rank has it, and it reads none."""
        del step
        return False

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        del report
        return self._refresh(state)

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        del epoch
        return self._refresh(state)

    def on_end(self, state: TrainState) -> TrainState:
        return self._refresh(state)

    def _refresh(self, state: TrainState) -> TrainState:
        if self._saver.saves == self._saves:
            return state
        self._saves = self._saver.saves
        drawn = [(prompt, path) for prompt, path in self._pictures() if path.is_file()]
        try:
            if write_card(self._path, self._text(state, drawn)) and self._saver.uploader is not None:
                shown = {_relative(path, self._path): path for _, path in drawn}
                self._saver.uploader.put_card(self._path, shown)
        except WriteFailed as error:
            logger.warning("%s Training goes on", error)
        return state


def write_card(path: Path, text: str) -> bool:
    """Write a card, unless somebody else has written what is there. Returns whether it did."""
    with refusals_named(path):
        if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            logger.warning("%s was not written by a run, so it stays as it is", path, extra={"once": True})
            return False
        write_text(path, text)
    return True


def card_text(job: Job, trained: Trained, saver: Saver, state: TrainState, drawn: Drawn) -> str:
    """The card of the file that was saved last."""
    config, files = job.config, job.loader.files
    metadata, saving = config.metadata, config.saving
    newest = saver.newest
    assert newest is not None, "called after a save"
    words = trigger_words(job.data.datasets)
    return card(
        CardFacts(
            title=metadata.metadata_title or saving.output_name or newest.stem,
            file=newest.name,
            workflow=None if saving.no_workflow else workflow_path(newest).name,
            repository=saving.huggingface_repo_id,
            folder=saving.huggingface_path_in_repo or None,
            base_model=base_model(config, is_dev=files.is_dev),
            on_the_hub=config.model.pretrained_model_name_or_path != tiny.NAME,
            embeds_guidance=files.is_dev,
            readers=saver.readers,
            trigger_words=(metadata.metadata_trigger_phrase,) if metadata.metadata_trigger_phrase else words,
            example=example_prompt(job),
            strength=STRENGTH,
            settings=settings_rows(job, trained, state),
            others=other_files(config, newest, state),
            drawn_with=AVERAGE if config.averaging.ema_for_samples else "the weights",
            pictures=[ShownPicture(_relative(path, card_path(saving)), prompt) for prompt, path in drawn],
            description=metadata.metadata_description,
            usage=metadata.metadata_usage_hint,
            author=metadata.metadata_author,
            license=metadata.metadata_license,
            tags=tuple(tag.strip() for tag in (metadata.metadata_tags or "").split(",") if tag.strip()),
        )
    )


def other_files(config: TrainConfig, newest: Path, state: TrainState) -> Mapping[str, str]:
    """The average that was saved with `newest` and the best so far, with what they hold."""
    found = dict[str, str]()
    average = model_path(config.saving, average_stem(newest.stem))
    if config.averaging.ema_decay is not None and average.is_file():
        found[average.name] = f"{AVERAGE} (EMA)"
    best = model_path(config.saving, best_stem(config.saving.output_name))
    lowest_loss = lowest(state.validation_losses)
    if config.validation.keep_best and lowest_loss is not None and best.is_file():
        weights = AVERAGE if config.averaging.ema_for_samples else "the weights"
        found[best.name] = f"{weights} of step {lowest_loss[0]}, where the validation loss was lowest"
    return found


def base_model(config: TrainConfig, *, is_dev: bool) -> str:
    """The base model's name on the Hub: as given, or that of the model whose architecture a file has."""
    given = config.model.pretrained_model_name_or_path or ""
    if given.count("/") == 1 and not Path(given).expanduser().exists():
        return given
    return DEV if is_dev else SCHNELL


def settings_rows(job: Job, trained: Trained, state: TrainState) -> Mapping[str, str]:
    """How it was trained, in words."""
    config, plan, ranks = job.config, job.data.plan, job.backend.world.size
    network, optimizer, timesteps = config.network, config.optimizer, config.objective.timestep_sampling
    records = [record for record in job.data.training.records if not record.is_reg]
    rates = [("", optimizer.learning_rate), ("transformer ", optimizer.unet_lr)]
    rates += [("text encoder ", rate) for rate in optimizer.text_encoder_lr or ()]
    sizes = dict.fromkeys("x".join(map(str, dataset.resolution)) for dataset in job.data.datasets)
    if timesteps == "shift":
        timesteps += f" {config.objective.discrete_flow_shift:g}"
    rows = {
        "base model": job.loader.files.transformer.name,
        "network": str(network.network_module),
        "rank": ""
        if network.network_dim is None
        else f"{network.network_dim}, alpha {network.network_alpha:g}",
        "network arguments": " ".join(network.network_args),
        "steps": f"{state.step} of {plan.total_steps}",
        "epochs": f"{state.step / plan.steps_per_epoch:.4g} of {plan.num_epochs}",
        "images": f"{len(records)}, {sum(record.num_repeats for record in records)} an epoch with repeats",
        "images a step": f"{state.samples_seen / state.step:.3g}" if state.step else "",
        "resolution": ", ".join(sizes),
        "optimizer": trained.optimizer.description,
        "learning rate": ", ".join(f"{name}{rate:g}" for name, rate in rates if rate is not None),
        "schedule": config.schedule.lr_scheduler_type or config.schedule.lr_scheduler,
        "timesteps": timesteps,
        "guidance": f"{config.objective.guidance_scale:g}" if job.loader.files.is_dev else "",
        "precision": config.training.mixed_precision,
        "seed": str(state.seed),
        "mean loss": f"{state.average_loss:.4f} in the last epoch" if state.losses else "",
        "trained with": f"Polyrank {library.__version__} in {ranks} process{'es' if ranks > 1 else ''}",
    }
    return {name: value for name, value in rows.items() if value}


def _relative(path: Path, card: Path) -> str:
    return Path(os.path.relpath(path, card.parent)).as_posix()
