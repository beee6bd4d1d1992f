"""What adapter files say of the datasets, in Kohya's JSON forms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.config.dataset_settings import DatasetSettings, SubsetSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketFacts:
    """The buckets of one dataset in use: (width, height) in pixels and images times repeats."""

    buckets: tuple[tuple[tuple[int, int], int], ...]
    mean_aspect_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetFacts:
    """What one dataset turned out to hold. Image counts are before repeats, one a subset."""

    settings: DatasetSettings
    image_counts: tuple[int, ...]
    num_train_images: int  # times repeats
    num_reg_images: int  # times repeats, before balancing
    tag_frequency: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # folder -> tag -> count
    buckets: BucketFacts | None = None  # None without buckets


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """How often each tag (text between commas, stripped, in lower case) is in the captions of a folder."""
    tags = (tag.strip().lower() for caption in captions for tag in caption.split(","))
    return dict(Counter(tag for tag in tags if tag))


def plain_frequency(frequency: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Folder -> tag -> count, as plain dictionaries: ss_tag_frequency."""
    return {folder: dict(tags) for folder, tags in frequency.items()}


def bucket_info(dataset: DatasetFacts) -> dict[str, object] | None:
    """ss_bucket_info; None without buckets."""
    if dataset.buckets is None:
        return None
    buckets = {
        number: {"resolution": list(size), "count": count}
        for number, (size, count) in enumerate(dataset.buckets.buckets)
    }
    return {"buckets": buckets, "mean_img_ar_error": dataset.buckets.mean_aspect_error}


def _pairs(dataset: DatasetFacts) -> list[tuple[SubsetSettings, int]]:
    return list(zip(dataset.settings.subsets, dataset.image_counts, strict=True))


def _name(subset: SubsetSettings) -> str:
    """The base name of a subset's metadata file, else of its folder."""
    path = subset.metadata_file or subset.image_dir
    return path.name if path is not None else ""


def folders(dataset: DatasetFacts, *, reg: bool) -> dict[str, dict[str, int]]:
    """Repeats and images of each folder: ss_dataset_dirs, or with `reg` ss_reg_dataset_dirs."""
    return {
        _name(subset): {"n_repeats": subset.num_repeats, "img_count": count}
        for subset, count in _pairs(dataset)
        if subset.is_reg == reg
    }


def named_folders(datasets: Iterable[DatasetFacts]) -> dict[str, dict[str, int]]:
    """ss_dataset_dirs over several datasets; a name that comes again is "name (2)", "name (3)", ..."""
    named: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for subset, count in _pairs(dataset):
            if subset.is_reg:
                continue
            name, number = _name(subset), 1
            while name in named:
                number += 1
                name = f"{_name(subset)} ({number})"
            named[name] = {"n_repeats": subset.num_repeats, "img_count": count}
    return named


def merged_frequency(datasets: Iterable[DatasetFacts]) -> dict[str, dict[str, int]]:
    """Tags by folder; the first dataset that has a folder wins."""
    merged: dict[str, dict[str, int]] = {}
    for dataset in datasets:
        for folder, tags in dataset.tag_frequency.items():
            merged.setdefault(folder, dict(tags))
    return merged


def describe(dataset: DatasetFacts) -> dict[str, object]:
    """One entry of ss_datasets."""
    settings = dataset.settings
    skipped = settings.skip_image_resolution  # a key of newer versions of Kohya's trainer
    return {
        "is_dreambooth": all(subset.metadata_file is None for subset in settings.subsets),
        "batch_size_per_device": settings.batch_size,
        "num_train_images": dataset.num_train_images,
        "num_reg_images": dataset.num_reg_images,
        "resolution": list(settings.resolution),
        "enable_bucket": settings.enable_bucket,
        "min_bucket_reso": settings.min_bucket_reso,
        "max_bucket_reso": settings.max_bucket_reso,
        **({"skip_image_resolution": list(skipped)} if skipped else {}),
        "tag_frequency": plain_frequency(dataset.tag_frequency),
        "bucket_info": bucket_info(dataset),
        "resize_interpolation": settings.resize_interpolation,
        "subsets": [_subset(subset, count) for subset, count in _pairs(dataset)],
    }


def _subset(subset: SubsetSettings, count: int) -> dict[str, object]:
    described: dict[str, object] = {
        "img_count": count,
        "num_repeats": subset.num_repeats,
        "color_aug": subset.color_aug,
        "flip_aug": subset.flip_aug,
        "random_crop": subset.random_crop,
        "shuffle_caption": subset.shuffle_caption,
        "keep_tokens": subset.keep_tokens,
        "keep_tokens_separator": subset.keep_tokens_separator,
        "secondary_separator": subset.secondary_separator,
        "enable_wildcard": subset.enable_wildcard,
        "caption_prefix": subset.caption_prefix,
        "caption_suffix": subset.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
    }
    if subset.image_dir is not None:
        described["image_dir"] = subset.image_dir.name
    if subset.metadata_file is not None:
        described["metadata_file"] = subset.metadata_file.name
    else:
        described["class_tokens"] = subset.class_tokens
        described["is_reg"] = subset.is_reg
    return described
