"""The caching phase: latents and text outputs made before training, each encoder in memory only while it works.

Ranks share the files out and wait for one another without a collective, so one may take hours longer. What needs
no encoding loads no encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from library.adapters.pictures import image_encoder
from library.adapters.text import FluxTextEncoders
from library.cache.build import build_latents, build_text
from library.cache.latents import LatentNeed, LatentStore, latent_needs
from library.cache.survey import (
    LATENTS,
    TEXTS,
    CacheOptions,
    Work,
    check_memory,
    check_space,
    survey_latents,
    survey_text,
)
from library.cache.text import TextNeed, TextStore, text_needs
from library.cache.variants import plan_variants
from library.config.prompts import SamplePrompt
from library.config.train_config import TrainConfig
from library.data.dataset import TrainingData
from library.data.records import TextCond
from library.distributed.base import Backend
from library.models.memory import free_memory
from library.train.loading import ModelLoader
from library.train.prepare import Data
from library.train.prompt_cache import PromptCache

logger = logging.getLogger(__name__)

CAPTION_BATCH = 16  # captions encoded at once when no batch size is given


@dataclass(frozen=True, slots=True, kw_only=True)
class CachingPhase:
    """What both passes need."""

    config: TrainConfig
    loader: ModelLoader
    backend: Backend
    console: Console

    def latents(self, data: Data) -> Data:
        """Cache the latents of training and validation images, if asked to. Returns data that reads them."""
        caching = self.config.caching
        if not caching.cache_latents:
            return data
        sources = [source for source in (data.training, data.validation) if source is not None]
        needs, store = latent_needs(*sources), LatentStore()
        options = self._options(caching.cache_latents_to_disk, caching.vae_batch_size)
        encoder = self.loader.autoencoder_identity()
        work = survey_latents(needs, encoder=encoder, options=options)
        self._announce(LATENTS, work)
        if work.to_write or work.to_keep:
            encode = image_encoder(self.loader.autoencoder(), self.backend.world.device)
            with self._progress(f"caching {LATENTS}") as report:
                options = replace(options, progress=report)
                build_latents(work, store, encode, encoder=encoder, options=options)
            del encode  # and the autoencoder with it
            free_memory()
        self.backend.wait("latents cached")
        return _reading(data, lambda source: replace(source, latents=store))

    def text(self, data: Data, prompts: Sequence[str]) -> tuple[Data, dict[str, TextCond]]:
        """Cache the text outputs, if asked to, and encode sample prompts. The encoders are gone afterwards."""
        config = self.config
        cached = config.caching.cache_text_encoder_outputs
        needs, store = planned_text(config, data)
        text_options = self.loader.text_options()
        batch_size = config.caching.text_encoder_batch_size or CAPTION_BATCH
        options = self._options(config.caching.cache_text_encoder_outputs_to_disk, batch_size)
        work = survey_text(needs, text_options=text_options, options=options)
        if cached:
            self._announce(TEXTS, work)
            self._announce_size(work)
        kept = PromptCache.of(config, text_options)
        conditions = kept.read(prompts)
        missing = [prompt for prompt in prompts if prompt not in conditions]
        if work.to_write or work.to_keep or missing:
            encoders = self.loader.text_encoders(self.backend.world.device)
            with self._progress(f"caching {TEXTS}") as report:
                options = replace(options, progress=report)
                build_text(work, store, encoders.encode, text_options=text_options, options=options)
            conditions |= encode_prompts(encoders, missing)
            del encoders
            if missing and self.backend.world.is_main:
                kept.write({prompt: conditions[prompt] for prompt in prompts})
            free_memory()
        self.backend.wait("text cached")
        if not cached:
            return data, conditions
        return _reading(data, lambda source: replace(source, text=store)), conditions

    def _options(self, to_disk: bool, batch_size: int) -> CacheOptions:
        world = self.backend.world
        return CacheOptions(
            rank=world.rank,
            world=world.size,
            batch_size=batch_size,
            to_disk=to_disk,
            skip_check=self.config.caching.skip_cache_check,
        )

    def _announce(self, what: str, work: Work[LatentNeed] | Work[TextNeed]) -> None:
        for notice in work.notices:
            logger.warning(notice, extra={"once": True})  # a folder that cannot be written has both caches
        missing = len(work.to_write) + len(work.to_keep)
        ranks = self.backend.world.size
        share = f" in this process, one of {ranks}" if ranks > 1 else ""
        logger.info("%s: %d of %d to encode%s", what, missing, work.num_checked, share)

    def _announce_size(self, work: Work[TextNeed]) -> None:
        """Say what this rank will keep. Raises DatasetError or ConfigError if that does not fit."""
        size = self.loader.text_size()
        for needs, total, place in (
            (work.to_write, size.on_disk(work.to_write), "on disk"),
            (work.to_keep, size.in_memory(work.to_keep), "in memory"),
        ):
            if needs:
                count = sum(len(need.captions) for need in needs)
                logger.info("%d captions to encode, about %.1f MB %s", count, total / 1e6, place)
        check_memory(size.in_memory(work.to_keep), "text_cache_variants")
        check_space([(need.path, size.on_disk([need])) for need in work.to_write], "text_cache_variants")

    def _progress(self, what: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return progress_bar(what, self.console if self.backend.world.is_main else None)


def planned_text(config: TrainConfig, data: Data) -> tuple[tuple[TextNeed, ...], TextStore]:
    """The captions of training and validation that are to be cached, none if text is not, and their store."""
    if not config.caching.cache_text_encoder_outputs:
        return text_needs()
    sources = [(data.training, data.plan)]
    if data.validation is not None and data.validation_plan is not None:
        sources.append((data.validation, data.validation_plan))
    most = config.caching.text_cache_variants
    return text_needs(*((source, plan_variants(source, plan, most=most)) for source, plan in sources))


@contextmanager
def progress_bar(what: str, console: Console | None) -> Iterator[Callable[[int, int], None]]:
    """A bar that is gone when the pass is done; yields what to call with (done, of how many). None: no bar."""
    if console is None or not console.is_terminal:
        yield lambda done, total: None
        return
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None, visible=False)  # a pass may have nothing to do
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def prompt_texts(prompts: Sequence[SamplePrompt]) -> list[str]:
    """Every text that drawing `prompts` will ask conditions of."""
    unwanted = [prompt.negative_prompt for prompt in prompts if prompt.is_guided]
    return list(dict.fromkeys([*(prompt.prompt for prompt in prompts), *unwanted]))


def encode_prompts(encoders: FluxTextEncoders, prompts: Sequence[str]) -> dict[str, TextCond]:
    """Conditions by prompt text, one prompt at a time, kept on the CPU."""
    conditions = {}
    for prompt in prompts:
        text = encoders.encode([prompt])
        conditions[prompt] = TextCond(text.clip_pooled.cpu(), text.t5_hidden.cpu(), text.t5_mask.cpu())
    return conditions


def _reading(data: Data, change: Callable[[TrainingData], TrainingData]) -> Data:
    validation = change(data.validation) if data.validation is not None else None
    return replace(data, training=change(data.training), validation=validation)
