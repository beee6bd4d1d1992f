"""[dataset] Images, captions and how they are prepared. A dataset_config file overrides these by subset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.options import Limit, no_effect, option, refused

RATE = Limit(ge=0, le=1)
PIXELS = Limit(ge=16, unit="pixels")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """Images, captions, buckets, augmentation, loading."""

    dataset_config: Path | None = option(
        None, "dataset file (.toml or .json); the folder options are then ignored"
    )
    train_data_dir: Path | None = option(
        None, "folder whose sub-folders N_name hold the images, each repeated N times"
    )
    reg_data_dir: Path | None = option(None, "the same for regularisation images")
    in_json: Path | None = option(None, "metadata file with captions of the images of train_data_dir")
    dataset_repeats: int = option(1, "repeats of each image of in_json or dataset_config", limit=Limit(ge=1))
    dataset_class: str | None = option(
        None,
        "a dataset class of one's own",
        effect=refused(
            "such classes derive from sd-scripts' own and hand out finished batches, which can be neither planned, "
            "cached nor resumed here; list the images and captions in a metadata_file of dataset_config"
        ),
    )
    resolution: tuple[int, int] | None = option(
        None, 'size of the training images, "width,height" or one number'
    )
    train_batch_size: int = option(1, "images a step on each GPU", limit=Limit(ge=1, unit="images"))
    enable_bucket: bool = option(False, "group images by aspect ratio instead of cropping all to one size")
    min_bucket_reso: int = option(256, "shortest side of a bucket", limit=PIXELS)
    max_bucket_reso: int = option(1024, "longest side of a bucket", limit=PIXELS)
    bucket_reso_steps: int = option(
        64, "sides of buckets are multiples of this; itself a multiple of 16", limit=PIXELS
    )
    bucket_no_upscale: bool = option(False, "make buckets from the images' own sizes, never enlarge")
    skip_image_resolution: tuple[int, int] | None = option(
        None,
        'leave out images of at most this many pixels, "width,height" or one number for a square',
        limit=Limit(ge=1, unit="pixels"),
        ours=True,
    )
    resize_interpolation: str | None = option(
        None,
        "filter for resizing; unset is area when shrinking and lanczos when enlarging",
        choices=("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area"),
    )
    caption_extension: str = option(
        ".caption", "ending of caption files; none reads no file, captions are then class_tokens"
    )
    caption_extention: str | None = option(None, "old spelling of caption_extension")
    caption_separator: str = option(",", "what stands between the tags of a caption")
    shuffle_caption: bool = option(False, "shuffle the tags of a caption at each visit")
    keep_tokens: int = option(0, "leading tags that stay in place", limit=Limit(ge=0, unit="tags"))
    keep_tokens_separator: str = option(
        "", "mark that splits a caption into the part kept and the part shuffled"
    )
    secondary_separator: str | None = option(None, "second separator, for tags that stay together")
    enable_wildcard: bool = option(False, "{a|b} picks one, and one line of a caption is used")
    trigger_word: str | None = option(
        None,
        "word that comes first in captions that lack it, in place of [trigger] in captions and sample_prompts; "
        "not for regularisation images",
        ours=True,
    )
    caption_prefix: str | None = option(None, "text before every caption")
    caption_suffix: str | None = option(None, "text after every caption")
    caption_dropout_rate: float = option(0.0, "share of visits with an empty caption", limit=RATE)
    caption_dropout_every_n_epochs: int = option(
        0, "every n-th epoch has empty captions; 0 is never", limit=Limit(ge=0, unit="epochs")
    )
    caption_tag_dropout_rate: float = option(0.0, "share of tags that is dropped at each visit", limit=RATE)
    token_warmup_min: int = option(1, "tags a caption starts with", limit=Limit(ge=0, unit="tags"))
    token_warmup_step: float = option(
        0.0, "steps until all tags are used; below 1 a share of all steps", limit=Limit(ge=0, unit="steps")
    )
    color_aug: bool = option(False, "change the colours a little at random")
    flip_aug: bool = option(False, "mirror at random")
    face_crop_aug_range: tuple[float, float] | None = option(
        None, 'crop around faces, "smallest,largest" scale'
    )
    random_crop: bool = option(False, "crop at random instead of at the centre")
    alpha_mask: bool = option(False, "weight the loss by the images' alpha channel")
    masked_loss: bool = option(
        False, "weight the loss by mask images (conditioning_data_dir) or alpha channels (alpha_mask)"
    )
    conditioning_data_dir: Path | None = option(
        None, "mask images for masked_loss, of the images' names, in folders named as those of train_data_dir"
    )
    prior_loss_weight: float = option(1.0, "weight of regularisation images in the loss", limit=Limit(ge=0))
    cache_info: bool = option(False, "keep sizes and captions in metadata_cache.json in the image folder")
    max_data_loader_n_workers: int = option(
        8,
        "processes that prepare batches; 0 is the training process itself",
        limit=Limit(ge=0, unit="processes"),
    )
    persistent_data_loader_workers: bool = option(
        False,
        "keep these processes between epochs",
        effect=no_effect("they always live as long as the run", quiet=True),
    )
    debug_dataset: bool = option(
        False,
        "print each sample of the first epoch, draw contact sheets into <output_dir>/debug_dataset, stop",
    )
