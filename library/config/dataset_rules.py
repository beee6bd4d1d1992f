"""Checks of resolved datasets against each other and against the options of caching, batch and loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from library.config.dataset_settings import PRESERVATION, DatasetSettings, SubsetSettings
from library.config.notices import Notices
from library.config.train_config import TrainConfig
from library.errors import ConfigError

PATCH = 16  # pixels: FLUX packs latents of 8 pixels by 2 x 2


def check(
    config: TrainConfig, datasets: Sequence[DatasetSettings], places: Sequence[str], notices: Notices
) -> None:
    """Apply every rule to every dataset; `places` say where each was written.

    Raises ConfigError for the first rule that is broken.
    """
    for dataset, place in zip(datasets, places, strict=True):
        sizes_fit(dataset, place)
        has_training_images(dataset, place)
        batches_fill(config, dataset, place)
        faces_can_be_cropped(config, dataset, place, notices)
    for place, subset in _subsets(datasets):
        latents_can_be_cached(config, subset, place)
        trigger_word_is_a_tag(subset, place)
        masks_fit(subset, place)
        attributes_are_known(subset, place, notices)
    text_can_be_cached(config, datasets, notices)
    masks_are_there(config, datasets, notices)
    validation_has_images(config, datasets, notices)


def sizes_fit(dataset: DatasetSettings, place: str) -> None:
    """Every image size must be a multiple of 16 pixels, and the buckets must include the resolution."""
    width, height = dataset.resolution
    if not dataset.enable_bucket:
        if width % PATCH or height % PATCH:
            raise ConfigError(
                f"{place}: resolution {width}x{height} must be a "
                f"multiple of {PATCH} in both directions for FLUX; "
                "change it or set enable_bucket"
            )
        return
    if dataset.bucket_reso_steps % PATCH:
        raise ConfigError(
            f"{place}: bucket_reso_steps = {dataset.bucket_reso_steps} must be a multiple of {PATCH} for FLUX"
        )
    if dataset.bucket_no_upscale:  # buckets then follow the images' own sizes
        return
    if min(width, height) < dataset.min_bucket_reso:
        raise ConfigError(
            f"{place}: min_bucket_reso = {dataset.min_bucket_reso} is above the shorter side of resolution "
            f"{width}x{height}; lower it"
        )
    if max(width, height) > dataset.max_bucket_reso:
        raise ConfigError(
            f"{place}: max_bucket_reso = {dataset.max_bucket_reso} is below the longer side of resolution "
            f"{width}x{height}; raise it"
        )


def has_training_images(dataset: DatasetSettings, place: str) -> None:
    """Regularisation images only accompany others."""
    if all(subset.is_reg for subset in dataset.subsets):
        raise ConfigError(f"{place} has regularisation images only: add a subset without is_reg")


def batches_fill(config: TrainConfig, dataset: DatasetSettings, place: str) -> None:
    """global_batch_size is made of whole micro-batches."""
    wanted = config.training.global_batch_size
    if wanted is not None and wanted % dataset.batch_size:
        raise ConfigError(
            f"{place}: global_batch_size = {wanted} must be a "
            f"multiple of the batch size, {dataset.batch_size}"
        )


def latents_can_be_cached(config: TrainConfig, subset: SubsetSettings, place: str) -> None:
    """Cached latents are of one crop and one colouring."""
    if not config.caching.cache_latents:
        return
    for name, on in (("color_aug", subset.color_aug), ("random_crop", subset.random_crop)):
        if on:
            raise ConfigError(f"{place}: {name} cannot be used with cache_latents: turn off one of them")


def text_can_be_cached(config: TrainConfig, datasets: Sequence[DatasetSettings], notices: Notices) -> None:
    """Captions that change at each visit are encoded up to a number; dropped ones have the empty caption's."""
    caching = config.caching
    subsets = [subset for _, subset in _subsets(datasets)]
    changing = {
        "shuffle_caption": any(subset.shuffle_caption for subset in subsets),
        "enable_wildcard": any(subset.enable_wildcard for subset in subsets),
        "token_warmup_step": any(subset.token_warmup_step > 0 for subset in subsets),
        "caption_tag_dropout_rate": any(subset.caption_tag_dropout_rate > 0 for subset in subsets),
    }
    given = ", ".join(name for name, on in changing.items() if on)
    if not given or not caching.cache_text_encoder_outputs:
        return
    notices.advise(
        "caption-variants",
        f"text encoder outputs are cached, so an image has {caching.text_cache_variants} captions at most by "
        f"{given}; text_cache_variants changes that",
    )
    if caching.cache_text_encoder_outputs_to_disk and config.training.seed is None:
        notices.advise(
            "caption-variants-seed",
            f"each seed draws other captions by {given}, and seed is not given: give one, and the next run finds "
            "its text encoder outputs cached",
        )


def trigger_word_is_a_tag(subset: SubsetSettings, place: str) -> None:
    """It is kept in place as one tag."""
    trigger = subset.trigger_word or ""
    if trigger != trigger.strip() or "\n" in trigger:
        raise ConfigError(f"{place}: trigger_word = {trigger!r} has blanks around it or several lines")
    for name in ("caption_separator", "secondary_separator", "keep_tokens_separator"):
        mark = getattr(subset, name)
        if mark and mark in trigger:
            raise ConfigError(
                f"{place}: trigger_word = {trigger!r} must be a single tag, but {name} {mark!r} is in it"
            )


def faces_can_be_cropped(config: TrainConfig, dataset: DatasetSettings, place: str, notices: Notices) -> None:
    """Crops around faces are cut from whole pictures only, as in Kohya."""
    if not any(subset.face_crop_aug_range for subset in dataset.subsets):
        return
    rivals = {"enable_bucket": dataset.enable_bucket, "cache_latents": config.caching.cache_latents}
    for name, on in rivals.items():
        if on:
            notices.remarks.append(f"{place}: face_crop_aug_range has no effect with {name}")


def attributes_are_known(subset: SubsetSettings, place: str, notices: Notices) -> None:
    """Kohya reads one of them, a yes or no."""
    attributes = dict(subset.custom_attributes)
    preserves = attributes.pop(PRESERVATION, False)
    if not isinstance(preserves, bool):
        raise ConfigError(f"{place}: custom_attributes {PRESERVATION} = {preserves!r} must be true or false")
    if attributes:
        notices.remarks.append(f"{place}: custom_attributes without effect: {', '.join(attributes)}")


def masks_fit(subset: SubsetSettings, place: str) -> None:
    """Masks are not cropped at random with their images."""
    if subset.conditioning_data_dir is not None and subset.random_crop:
        raise ConfigError(f"{place}: random_crop cannot be used with mask images: turn it off")


def masks_are_there(config: TrainConfig, datasets: Sequence[DatasetSettings], notices: Notices) -> None:
    """masked_loss takes its weights from mask images or alpha channels."""
    subsets = [subset for _, subset in _subsets(datasets)]
    if config.dataset.masked_loss and not any(s.conditioning_data_dir or s.alpha_mask for s in subsets):
        notices.remarks.append(
            "masked_loss has no effect: there is no conditioning_data_dir with masks and no alpha_mask"
        )


def validation_has_images(config: TrainConfig, datasets: Sequence[DatasetSettings], notices: Notices) -> None:
    """Images are held back by validation_split only."""
    names = ("validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps")
    given = [name for name in names if config.value(name) is not None]
    if given and not any(subset.validation_split > 0 for _, subset in _subsets(datasets)):
        notices.remarks.append(
            f"without validation_split nothing is validated, so ignored: {', '.join(given)}"
        )


def _subsets(datasets: Sequence[DatasetSettings]) -> Iterator[tuple[str, SubsetSettings]]:
    for number, dataset in enumerate(datasets, 1):
        for subset in dataset.subsets:
            yield f"dataset {number}, {subset.metadata_file or subset.image_dir}", subset
