"""What the data layer is told about each dataset: Kohya's dataset and subset options with every inheritance
resolved.

Only values: where they come from (command line, TOML, folder names) is the business of the loader of configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetSettings:
    """One folder or one metadata file, and how its images and captions are treated."""

    image_dir: Path | None = None
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None  # mask images, with masked_loss
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None  # stands in for a missing caption file
    caption_extension: str = ".caption"
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    shuffle_caption: bool = False
    caption_dropout_rate: float = 0.0  # 0..1
    caption_dropout_every_n_epochs: int = 0  # 0: never
    caption_tag_dropout_rate: float = 0.0  # 0..1
    token_warmup_min: int = 1  # tokens
    token_warmup_step: float = 0.0  # optimizer steps, or below 1 a share of all steps
    color_aug: bool = False
    flip_aug: bool = False
    face_crop_aug_range: tuple[float, float] | None = None  # face as a share of the short side
    random_crop: bool = False
    alpha_mask: bool = False
    cache_info: bool = False
    resize_interpolation: str | None = None  # None: as the dataset
    validation_split: float | None = None  # 0..1; None: as the dataset
    validation_seed: int | None = None  # None: as the dataset
    custom_attributes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSettings:
    """A set of subsets that share a resolution, a batch size and buckets."""

    resolution: tuple[int, int]  # width, height in pixels
    batch_size: int = 1
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    resize_interpolation: str | None = None
    validation_split: float = 0.0
    validation_seed: int | None = None  # None: the run's seed
    prior_loss_weight: float = 1.0
    subsets: tuple[SubsetSettings, ...] = ()
