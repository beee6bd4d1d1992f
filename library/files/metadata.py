"""The metadata in an adapter file's header: Kohya's `ss_*` keys and ModelSpec 1.0.1's `modelspec.*` keys.

Every key is a row of one of the tables below, so what a file says can be read off this page. Values are
text: Python's `str` of the option, or JSON where Kohya writes JSON. Nothing is computed here that costs
anything: hashes, counts and frequencies come in as `RunFacts`. The `sshs_*` hashes are added by whoever
writes the file (`library.files.hashes`).
"""

from __future__ import annotations

import base64
import json
import logging
import mimetypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from library.files.dataset_metadata import (
    DatasetFacts,
    bucket_info,
    describe,
    folders,
    merged_frequency,
    named_folders,
    plain_frequency,
)

if TYPE_CHECKING:
    from library.config.train_config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A base model's name (of its file, or as given) and hashes; None where it is no single file."""

    name: str
    short_hash: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the metadata tells of a run beyond its options. Times are seconds since 1970."""

    session_id: int
    started_at: float
    seed: int
    datasets: tuple[DatasetFacts, ...]
    num_validation_images: int
    num_batches_per_epoch: int  # of one process
    num_epochs: int
    max_train_steps: int
    world_size: int
    optimizer: str  # "module.Class" or "module.Class(k=v,...)"
    model: ModelFacts
    vae: ModelFacts | None = None
    is_schnell: bool = False
    network_args: Mapping[str, object] | None = None  # None when the option is empty
    trigger_words: tuple[str, ...] = ()
    single_text_encoder_lr: bool = False  # the network takes one rate for all text encoders
    optimizer_sets_rate: bool = False  # Adafactor with relative_step
    trainer_version: str = "unknown"  # such as "polyrank/0.1.0"


class _Source:
    """What a row is read from."""

    def __init__(self, config: TrainConfig, facts: RunFacts) -> None:
        self.options: Mapping[str, object] = config.flat()
        self.facts = facts
        self.chroma = self.options["model_type"] == "chroma"

    @property
    def first(self) -> DatasetFacts:
        return self.facts.datasets[0]


Row = Callable[[_Source], object]

# Keys whose value is an option's, under Kohya's name for it.
OPTION_KEYS: Mapping[str, str] = {
    "ss_output_name": "output_name",
    "ss_training_comment": "training_comment",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_mixed_precision": "mixed_precision",
    "ss_full_fp16": "full_fp16",
    "ss_fp8_base": "fp8_base",
    "ss_fp8_base_unet": "fp8_base_unet",
    "ss_lowram": "lowram",
    "ss_network_module": "network_module",
    "ss_network_dim": "network_dim",
    "ss_network_alpha": "network_alpha",
    "ss_network_dropout": "network_dropout",
    "ss_scale_weight_norms": "scale_weight_norms",
    "ss_learning_rate": "learning_rate",
    "ss_unet_lr": "unet_lr",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_v2": "v2",
    "ss_clip_skip": "clip_skip",
    "ss_max_token_length": "max_token_length",
    "ss_model_type": "model_type",
    "ss_apply_t5_attn_mask": "apply_t5_attn_mask",
    "ss_weighting_scheme": "weighting_scheme",
    "ss_logit_mean": "logit_mean",
    "ss_logit_std": "logit_std",
    "ss_mode_scale": "mode_scale",
    "ss_guidance_scale": "guidance_scale",
    "ss_timestep_sampling": "timestep_sampling",
    "ss_sigmoid_scale": "sigmoid_scale",
    "ss_model_prediction_type": "model_prediction_type",
    "ss_discrete_flow_shift": "discrete_flow_shift",
    "ss_loss_type": "loss_type",
    "ss_huber_schedule": "huber_schedule",
    "ss_huber_scale": "huber_scale",
    "ss_huber_c": "huber_c",
    "ss_noise_offset": "noise_offset",
    "ss_noise_offset_random_strength": "noise_offset_random_strength",
    "ss_multires_noise_iterations": "multires_noise_iterations",
    "ss_multires_noise_discount": "multires_noise_discount",
    "ss_adaptive_noise_scale": "adaptive_noise_scale",
    "ss_zero_terminal_snr": "zero_terminal_snr",
    "ss_ip_noise_gamma": "ip_noise_gamma",
    "ss_ip_noise_gamma_random_strength": "ip_noise_gamma_random_strength",
    "ss_min_snr_gamma": "min_snr_gamma",
    "ss_debiased_estimation": "debiased_estimation_loss",
    "ss_prior_loss_weight": "prior_loss_weight",
    "ss_cache_latents": "cache_latents",
    "ss_caption_dropout_rate": "caption_dropout_rate",
    "ss_caption_dropout_every_n_epochs": "caption_dropout_every_n_epochs",
    "ss_caption_tag_dropout_rate": "caption_tag_dropout_rate",
    "ss_face_crop_aug_range": "face_crop_aug_range",
    "ss_resize_interpolation": "resize_interpolation",
    "ss_validation_seed": "validation_seed",
    "ss_validation_split": "validation_split",
    "ss_max_validation_steps": "max_validation_steps",
    "ss_validate_every_n_epochs": "validate_every_n_epochs",
    "ss_validate_every_n_steps": "validate_every_n_steps",
}

FACT_KEYS: Mapping[str, Row] = {
    "ss_session_id": lambda s: s.facts.session_id,
    "ss_training_started_at": lambda s: s.facts.started_at,
    "ss_seed": lambda s: s.facts.seed,
    "ss_num_epochs": lambda s: s.facts.num_epochs,
    "ss_max_train_steps": lambda s: s.facts.max_train_steps,
    "ss_num_batches_per_epoch": lambda s: s.facts.num_batches_per_epoch,
    "ss_num_train_images": lambda s: sum(dataset.num_train_images for dataset in s.facts.datasets),
    "ss_num_reg_images": lambda s: sum(dataset.num_reg_images for dataset in s.facts.datasets),
    "ss_num_validation_images": lambda s: s.facts.num_validation_images,
    "ss_optimizer": lambda s: s.facts.optimizer,
    "ss_text_encoder_lr": lambda s: _text_encoder_lr(s.options["text_encoder_lr"], s.facts),
    "ss_base_model_version": lambda s: "chroma" if s.chroma else "flux1",
    "ss_sd_model_name": lambda s: s.facts.model.name,
    "ss_sd_scripts_commit_hash": lambda _: "(unknown)",  # what Kohya's trainer says outside its own checkout
}

# Keys that are left out where their value is None.
OPTIONAL_KEYS: Mapping[str, Row] = {
    "ss_sd_model_hash": lambda s: s.facts.model.short_hash,
    "ss_new_sd_model_hash": lambda s: s.facts.model.sha256,
    "ss_vae_name": lambda s: s.facts.vae and s.facts.vae.name,
    "ss_vae_hash": lambda s: s.facts.vae and s.facts.vae.short_hash,
    "ss_new_vae_hash": lambda s: s.facts.vae and s.facts.vae.sha256,
    "ss_network_args": lambda s: (
        None if s.facts.network_args is None else json.dumps(dict(s.facts.network_args))
    ),
}

# Without dataset_config there is one dataset, and its options are the run's.
FOLDER_OPTION_KEYS: Mapping[str, str] = {
    "ss_color_aug": "color_aug",
    "ss_flip_aug": "flip_aug",
    "ss_random_crop": "random_crop",
    "ss_shuffle_caption": "shuffle_caption",
    "ss_keep_tokens": "keep_tokens",
    "ss_enable_bucket": "enable_bucket",
    "ss_bucket_no_upscale": "bucket_no_upscale",
}

FOLDER_KEYS: Mapping[str, Row] = {
    "ss_batch_size_per_device": lambda s: s.first.settings.batch_size,
    "ss_total_batch_size": lambda s: (
        s.first.settings.batch_size * s.facts.world_size * _integer(s.options["gradient_accumulation_steps"])
    ),
    "ss_resolution": lambda s: s.first.settings.resolution,
    "ss_min_bucket_reso": lambda s: s.first.settings.min_bucket_reso,
    "ss_max_bucket_reso": lambda s: s.first.settings.max_bucket_reso,
    "ss_dataset_dirs": lambda s: json.dumps(folders(s.first, reg=False)),
    "ss_reg_dataset_dirs": lambda s: json.dumps(folders(s.first, reg=True)),
    "ss_tag_frequency": lambda s: json.dumps(plain_frequency(s.first.tag_frequency)),
    "ss_bucket_info": lambda s: json.dumps(bucket_info(s.first)),
}

DATASET_CONFIG_KEYS: Mapping[str, Row] = {
    "ss_datasets": lambda s: json.dumps([describe(dataset) for dataset in s.facts.datasets]),
    "ss_tag_frequency": lambda s: json.dumps(merged_frequency(s.facts.datasets)),
    "ss_dataset_dirs": lambda s: json.dumps(named_folders(s.facts.datasets)),
}

# Rates that an optimizer which sets its own does not use; Kohya says None of them.
_RATE_KEYS = ("ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr")

# With no_metadata only these remain, beside modelspec.* and the hashes.
MINIMUM_KEYS = frozenset(
    {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha",
        "ss_network_args",
    }
)  # fmt: skip

# ModelSpec keys; None leaves a key out.
MODELSPEC_KEYS: Mapping[str, Row] = {
    "modelspec.sai_model_spec": lambda _: "1.0.1",
    "modelspec.architecture": lambda s: f"{_architecture(s)}/lora",
    "modelspec.implementation": lambda s: (
        "https://huggingface.co/lodestones/Chroma"
        if s.chroma
        else "https://github.com/black-forest-labs/flux"
    ),
    "modelspec.implementation_version": lambda s: s.facts.trainer_version,
    "modelspec.title": lambda s: (
        s.options["metadata_title"] or s.options["output_name"] or f"LoRA@{s.facts.started_at}"
    ),
    "modelspec.resolution": lambda s: "x".join(str(side) for side in s.first.settings.resolution),
    "modelspec.date": lambda s: _date(s.facts.started_at),
    "modelspec.description": lambda s: s.options["metadata_description"],
    "modelspec.author": lambda s: s.options["metadata_author"],
    "modelspec.license": lambda s: s.options["metadata_license"],
    "modelspec.tags": lambda s: s.options["metadata_tags"],
    "modelspec.usage_hint": lambda s: s.options["metadata_usage_hint"],
    "modelspec.merged_from": lambda s: s.options["metadata_merged_from"],
    "modelspec.trigger_phrase": lambda s: (
        s.options["metadata_trigger_phrase"] or ", ".join(s.facts.trigger_words) or None
    ),
    "modelspec.preprocessor": lambda s: s.options["metadata_preprocessor"],
    "modelspec.is_negative_embedding": lambda s: s.options["metadata_is_negative_embedding"],
    "modelspec.thumbnail": lambda s: _thumbnail(s.options["metadata_thumbnail"]),
    "modelspec.timestep_range": lambda s: _timestep_range(
        s.options["min_timestep"], s.options["max_timestep"]
    ),
    "modelspec.encoder_layer": lambda s: s.options["clip_skip"],
}


def build(config: TrainConfig, facts: RunFacts) -> dict[str, str]:
    """The metadata of a run's adapter files, but for what `at_save` adds. At least one dataset is needed."""
    source = _Source(config, facts)
    with_config = source.options["dataset_config"] is not None or config.dataset_tables is not None
    values: dict[str, object] = {key: source.options[name] for key, name in OPTION_KEYS.items()}
    values |= {key: row(source) for key, row in FACT_KEYS.items()}
    if not with_config:
        values |= {key: source.options[name] for key, name in FOLDER_OPTION_KEYS.items()}
    rows = DATASET_CONFIG_KEYS if with_config else FOLDER_KEYS
    values |= {key: row(source) for key, row in rows.items()}
    optional = {key: row(source) for key, row in (*OPTIONAL_KEYS.items(), *MODELSPEC_KEYS.items())}
    values |= {key: value for key, value in optional.items() if value is not None}
    if facts.optimizer_sets_rate:
        values |= dict.fromkeys(_RATE_KEYS) | {"ss_lr_scheduler": f"adafactor:{values['ss_learning_rate']}"}
    if source.options["no_metadata"]:
        values = {k: v for k, v in values.items() if k in MINIMUM_KEYS or k.startswith("modelspec.")}
    return {key: str(value) for key, value in values.items()}


def at_save(metadata: Mapping[str, str], *, step: int, epoch: int, finished_at: float) -> dict[str, str]:
    """`metadata` as a file written now has it.

    `step` is optimizer steps done, `epoch` epochs done (epoch saves count the one just done), `finished_at`
    seconds since 1970. Metadata that no_metadata has reduced only gets the date.
    """
    updated = {**metadata, "modelspec.date": _date(finished_at)}
    if "ss_session_id" in metadata:
        updated["ss_steps"] = str(step)
        updated["ss_epoch"] = str(epoch)
        updated["ss_training_finished_at"] = str(finished_at)
    return updated


def _integer(value: object) -> int:
    assert isinstance(value, int)
    return value


def _text_encoder_lr(rates: object, facts: RunFacts) -> object:
    """A list for networks with a rate per encoder, the first rate for others, None when not given."""
    if not isinstance(rates, tuple) or not rates:
        return None
    return rates[0] if facts.single_text_encoder_lr else list(rates)


def _architecture(source: _Source) -> str:
    if source.chroma:
        return "chroma"
    return "flux-1-schnell" if source.facts.is_schnell else "flux-1-dev"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(int(seconds)).isoformat()


def _timestep_range(minimum: object, maximum: object) -> str | None:
    if minimum is None and maximum is None:
        return None
    return f"{0 if minimum is None else minimum},{1000 if maximum is None else maximum}"


def _thumbnail(given: object) -> str | None:
    """A data URL as it is; a file as one; a file that is not there warns and is left out."""
    if not given or str(given).startswith("data:"):
        return str(given) if given else None
    path = Path(str(given))
    if not path.is_file():
        logger.warning("metadata_thumbnail %s does not exist; the file gets no thumbnail", path)
        return None
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
