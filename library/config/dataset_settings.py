"""Datasets with all fallbacks resolved: what the data layer reads. Values only; `datasets` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

PRESERVATION = "diff_output_preservation"  # the one custom attribute that Kohya's trainer reads


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetSettings:
    """One folder or one metadata file of images. See `sections.dataset` for the options of the same names."""

    image_dir: Path | None = None  # None only beside a metadata_file with absolute paths
    metadata_file: Path | None = None
    conditioning_data_dir: Path | None = None  # mask images of the same names
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None  # caption of images without a caption file
    caption_extension: str = ".caption"  # with its dot
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    trigger_word: str | None = None  # None for regularisation images unless their subset names one
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    shuffle_caption: bool = False
    rejoin_tags: bool = False  # no key: cut and join captions as shuffling does, without shuffling
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0.0
    color_aug: bool = False
    flip_aug: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    random_crop: bool = False
    alpha_mask: bool = False
    cache_info: bool = False
    resize_interpolation: str | None = None
    validation_split: float = 0.0
    validation_seed: int | None = None
    custom_attributes: Mapping[str, object] = field(default_factory=dict)

    @property
    def plain_captions(self) -> bool:
        """Whether a caption is used as its file has it."""
        return not (
            self.caption_prefix
            or self.caption_suffix
            or self.secondary_separator
            or self.trigger_word
            or self.rejoin_tags
            or self.enable_wildcard
            or self.shuffle_caption
            or self.token_warmup_step > 0
            or self.caption_tag_dropout_rate > 0
        )

    @property
    def preserves(self) -> bool:
        """Whether its images are trained towards the frozen model's own answer (diff_output_preservation)."""
        return bool(self.custom_attributes.get(PRESERVATION))


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSettings:
    """Subsets that share size, batch size and buckets. Sizes are (width, height) in pixels."""

    resolution: tuple[int, int]
    batch_size: int = 1  # images a micro-batch on each rank
    enable_bucket: bool = False
    min_bucket_reso: int = 256  # a multiple of bucket_reso_steps when buckets are on
    max_bucket_reso: int = 1024  # likewise
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    skip_image_resolution: tuple[int, int] | None = None  # images of at most this area are left out
    resize_interpolation: str | None = None
    validation_split: float = 0.0
    validation_seed: int | None = None
    prior_loss_weight: float = 1.0  # weight of regularisation images
    subsets: tuple[SubsetSettings, ...] = ()
