"""What the caching phase will find and make: entries, bytes, folders. Cache files are opened, no encoder is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from library.cache.latents import CELL, CHANNELS, LatentNeed, latent_needs
from library.cache.survey import (
    LATENTS,
    TEXTS,
    CacheOptions,
    NeedT,
    Work,
    survey_latents,
    survey_text,
)
from library.config.train_config import TrainConfig
from library.preflight.facts import CacheFacts
from library.train.caching import planned_text
from library.train.loading import ModelLoader
from library.train.prepare import Data

FLOAT = 4  # bytes of a number in a file of latents


def caches(config: TrainConfig, loader: ModelLoader, data: Data) -> tuple[CacheFacts, ...]:
    """What each cache that is asked for needs."""
    caching, found = config.caching, []
    sources = [source for source in (data.training, data.validation) if source is not None]
    if caching.cache_latents:
        options = CacheOptions(to_disk=caching.cache_latents_to_disk, skip_check=caching.skip_cache_check)
        work = survey_latents(latent_needs(*sources), encoder=loader.autoencoder_identity(), options=options)
        sizes = [latent_bytes(need) for need in work.to_write]
        found.append(_facts(LATENTS, work, sizes, sum(map(latent_bytes, work.to_keep))))
    if caching.cache_text_encoder_outputs:
        options = CacheOptions(
            to_disk=caching.cache_text_encoder_outputs_to_disk, skip_check=caching.skip_cache_check
        )
        size = loader.text_size()
        texts = survey_text(
            planned_text(config, data)[0], text_options=loader.text_options(), options=options
        )
        sizes = [size.on_disk([need]) for need in texts.to_write]
        kept = size.in_memory(texts.to_keep)
        found.append(_facts(TEXTS, texts, sizes, kept))
    return tuple(found)


def latent_bytes(need: LatentNeed) -> int:
    """Bytes of one image's arrays: latents, mirrored ones if flipped, and a mask of the picture's own size."""
    width, height = need.placement.bucket
    latents = CHANNELS * (width // CELL) * (height // CELL)
    return FLOAT * (latents * (2 if need.flip else 1) + (width * height if need.mask else 0))


def _facts(what: str, work: Work[NeedT], sizes: Sequence[int], in_memory: int) -> CacheFacts:
    folders = Counter[Path]()
    for path, size in zip([need.path for need in work.to_write], sizes, strict=True):
        folders[path.parent] += size
    return CacheFacts(
        what=what,
        entries=work.num_checked,
        to_encode=len(work.to_write) + len(work.to_keep),
        bytes_in_memory=in_memory,
        bytes_by_folder=tuple(sorted(folders.items())),
        notices=work.notices,
    )
