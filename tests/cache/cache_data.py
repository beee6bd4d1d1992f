"""A small dataset and toy encoders for the cache tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from library.cache.build import build_latents, build_text
from library.cache.latents import LatentStore, latent_needs
from library.cache.survey import CacheOptions, survey_latents, survey_text
from library.cache.text import TextOptions, text_needs
from library.cache.variants import plan_variants
from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.data.dataset import TrainingData, place_records
from library.data.discover import discover
from library.data.plan import Plan, PlanSettings
from library.data.records import TextCond
from library.data.resize import resize

TEXT = TextOptions(encoder="toy", t5_length=4, apply_t5_attn_mask=False)


def write_pictures(folder: Path, sizes=((64, 64), (150, 50), (40, 70)), *, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number, (width, height) in enumerate(sizes):
        small = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8)
        Image.fromarray(resize(small, (width, height), "bilinear")).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"caption {number}")


def dataset(folder: Path, *, resolution=(64, 64), **options) -> DatasetSettings:
    subset = SubsetSettings(**{"image_dir": folder, "caption_extension": ".txt", **options})
    return DatasetSettings(
        resolution=resolution,
        batch_size=2,
        enable_bucket=True,
        min_bucket_reso=32,
        max_bucket_reso=128,
        bucket_reso_steps=32,
        subsets=(subset,),
    )


def data_of(*datasets: DatasetSettings, seed: int = 0) -> TrainingData:
    found = discover(datasets, seed=seed)
    return TrainingData(
        datasets=datasets,
        records=found.records,
        placements=place_records(datasets, found.records),
        seed=seed,
    )


class ToyImages:
    """An autoencoder of sorts: means of 8 x 8 cells in 16 channels, plus a tenth of the noise. Counts its
    calls.
    """

    def __init__(self, *, fail_after: int | None = None) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.fail_after = fail_after

    def __call__(self, images, noise):
        if self.fail_after is not None and len(self.batches) >= self.fail_after:
            raise KeyboardInterrupt
        self.batches.append(tuple(images.shape))
        assert noise.shape == (images.shape[0], 16, images.shape[2] // 8, images.shape[3] // 8)
        means = torch.nn.functional.avg_pool2d(images, 8)
        return means.repeat(1, 6, 1, 1)[:, :16] + 0.1 * noise

    @property
    def num_images(self) -> int:
        return sum(shape[0] for shape in self.batches)


class ToyText:
    """Encoders of sorts: numbers made from the caption's characters. Remembers what it was asked."""

    def __init__(self, *, length: int = 4, dtype=torch.float32) -> None:
        self.asked: list[str] = []
        self.length, self.dtype = length, dtype

    def __call__(self, captions):
        self.asked += captions
        value = torch.tensor([float(sum(map(ord, caption))) for caption in captions], dtype=self.dtype)
        mask = torch.ones(len(captions), self.length, dtype=torch.int64)
        return TextCond(
            clip_pooled=value[:, None].repeat(1, 3),
            t5_hidden=value[:, None, None].repeat(1, self.length, 5),
            t5_mask=mask,
        )


def cache_latents(*sources: TrainingData, encode=None, encoder: str = "ae", **options):
    """One whole pass; gives the store, the encoder and the work."""
    encode = encode or ToyImages()
    settings = CacheOptions(**{"batch_size": 2, **options})
    work = survey_latents(latent_needs(*sources), encoder=encoder, options=settings)
    store = LatentStore()
    build_latents(work, store, encode, encoder=encoder, options=settings)
    return store, encode, work


def planned(data: TrainingData, *, most: int = 8, epochs: int = 3):
    """The text that a run of some epochs over `data` needs, and its store."""
    settings = PlanSettings(
        seed=data.seed, batch_sizes=(2,) * len(data.datasets), units_per_step=1, max_train_epochs=epochs
    )
    return text_needs((data, plan_variants(data, Plan(data.planned_images(), settings), most=most)))


def cache_text(
    data: TrainingData,
    encode=None,
    text_options: TextOptions = TEXT,
    most: int = 8,
    epochs: int = 3,
    **options,
):
    encode = encode or ToyText()
    settings = CacheOptions(**{"batch_size": 2, **options})
    needs, store = planned(data, most=most, epochs=epochs)
    work = survey_text(needs, text_options=text_options, options=settings)
    build_text(work, store, encode, text_options=text_options, options=settings)
    return store, encode, work
