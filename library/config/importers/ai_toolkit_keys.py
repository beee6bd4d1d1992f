"""What becomes of each key of an ai-toolkit job; what several keys decide together is in `ai_toolkit`."""

from __future__ import annotations

import re
from typing import Any

from library.config.importers import common
from library.config.importers.rules import (
    ARGUMENT,
    DATASET,
    Table,
    argument,
    dataset,
    decides,
    dropped,
    option,
    same,
)

_HARDWARE = "where models lie is decided here"
_OTHER = "it belongs to another model family"
_NONE = "there is nothing like it here"
_TEXT_ENCODER = "text encoder weights are never quantised here; their outputs are cached and they are freed"
_LOSSES = {"mse": "l2", "l2": "l2", "mae": "l1", "l1": "l1"}
_KOHYA_PAIRS = "its dictionary, as key=value"


def _pairs(value: Any) -> object:
    return [f"{name}={entry}" for name, entry in dict(value).items()]


def _any_of(value: Any) -> str:
    names = value if isinstance(value, list) else [value]
    return "|".join(re.escape(str(name)) for name in names)


def _extension(value: Any) -> str:
    return "." + str(value).lstrip(".")


PROCESS: Table = {
    "type": decides(note="must be a trainer of LoRAs"),
    "training_folder": decides("output_dir", note="the folder of the job's name in it"),
    "trigger_word": option("trigger_word"),
    "training_seed": option("seed"),
    "device": dropped("accelerate launch chooses the GPUs"),
    "performance_log_every": dropped("the progress line always has the speed"),
    "sqlite_db_path": dropped(_NONE),
    "network.type": decides("network_module", ARGUMENT + "algo"),
    "network.linear": decides("network_dim"),
    "network.rank": decides("network_dim"),
    "network.linear_alpha": decides("network_alpha"),
    "network.alpha": decides("network_alpha"),
    "network.dropout": option("network_dropout"),
    "network.conv": dropped("FLUX has no convolutions"),
    "network.conv_alpha": dropped("FLUX has no convolutions"),
    "network.lokr_full_rank": decides("network_dim", note="LoKr's full matrix"),
    "network.lokr_factor": argument("factor"),
    "network.transformer_only": dropped("only the layers of blocks are trained anyway"),
    "network.pretrained_lora_path": option("network_weights"),
    "network.network_kwargs.only_if_contains": argument("target_regex", _any_of),
    "network.network_kwargs.ignore_if_contains": argument("exclude_regex", _any_of),
    "save.dtype": option("save_precision", lambda value: common.PRECISIONS.get(str(value), value)),
    "save.save_every": option("save_every_n_steps"),
    "save.max_step_saves_to_keep": decides("save_last_n_steps"),
    "save.save_format": dropped("always diffusers-readable safetensors with Kohya's keys"),
    "save.push_to_hub": decides("huggingface_repo_id"),
    "save.hf_repo_id": decides("huggingface_repo_id", note="with push_to_hub"),
    "save.hf_private": decides("huggingface_repo_visibility", note="with push_to_hub"),
    "train.batch_size": option("train_batch_size"),
    "train.steps": option("max_train_steps"),
    "train.gradient_accumulation_steps": option("gradient_accumulation_steps"),
    "train.gradient_accumulation": option("gradient_accumulation_steps"),
    "train.train_unet": dropped("the transformer is always trained"),
    "train.train_text_encoder": decides("network_train_unet_only"),
    "train.unet_lr": option("unet_lr"),
    "train.text_encoder_lr": decides("text_encoder_lr", note="with train_text_encoder"),
    "train.gradient_checkpointing": option("gradient_checkpointing"),
    "train.noise_scheduler": dropped("always flow matching"),
    "train.optimizer": decides("optimizer_type"),
    "train.optimizer_params": option("optimizer_args", _pairs, _KOHYA_PAIRS),
    "train.lr": option("learning_rate"),
    "train.lr_scheduler": option("lr_scheduler"),
    "train.lr_scheduler_params": option("lr_scheduler_args", _pairs, _KOHYA_PAIRS),
    "train.lr_warmup_steps": option("lr_warmup_steps"),
    "train.max_grad_norm": option("max_grad_norm"),
    "train.dtype": decides("mixed_precision"),
    "train.timestep_type": decides("timestep_sampling"),
    "train.content_or_style": decides("timestep_sampling", note="timestep_type wins over it"),
    "train.linear_timesteps": decides("timestep_sampling", note="timestep_type wins over it"),
    "train.min_denoising_steps": option("min_timestep"),
    "train.max_denoising_steps": option("max_timestep"),
    "train.loss_type": option("loss_type", lambda value: _LOSSES.get(str(value), value)),
    "train.skip_first_sample": decides("sample_at_first"),
    "train.force_first_sample": decides("sample_at_first"),
    "train.disable_sampling": decides("sample_every_n_steps"),
    "train.start_step": dropped("the state that is resumed knows its step"),
    "train.cache_text_embeddings": option("cache_text_encoder_outputs_to_disk"),
    "train.unload_text_encoder": dropped("text encoders are freed once their outputs are cached"),
    "train.xformers": option("xformers"),
    "train.sdp": option("sdpa"),
    "train.noise_offset": option("noise_offset"),
    "train.min_snr_gamma": option("min_snr_gamma"),
    "train.reg_weight": option("prior_loss_weight"),
    "train.ema_config.use_ema": decides("ema_decay", "ema_for_samples"),
    "train.ema_config.ema_decay": decides("ema_decay", note="with use_ema"),
    "train.bypass_guidance_embedding": dropped("the guidance embedding is trained at guidance_scale 1"),
    **dict.fromkeys(
        (
            *("train.weight_jitter", "train.free_u", "train.noise_multiplier", "train.img_multiplier"),
            *("train.single_item_batching", "train.short_and_long_captions", "train.loss_target"),
            *("train.diff_output_preservation", "train.diff_output_preservation_multiplier"),
            *("train.diff_output_preservation_class", "train.blank_prompt_preservation"),
            *("train.do_differential_guidance", "train.switch_boundary_every", "train.do_paramiter_swapping"),
            *("train.inverted_mask_prior", "train.inverted_mask_prior_multiplier"),
            "train.merge_network_on_save",
        ),
        dropped(_NONE),
    ),
    "model.name_or_path": option("pretrained_model_name_or_path"),
    "model.is_flux": decides(note="other models are refused"),
    "model.arch": decides(note="other models than flux are refused"),
    "model.quantize": option("fp8_base", common.truth, "float8 storage stands in for 8-bit quanto"),
    "model.qtype": dropped("the one quantisation here is fp8_base"),
    "model.quantize_te": dropped(_TEXT_ENCODER),
    "model.qtype_te": dropped(_TEXT_ENCODER),
    "model.quantize_kwargs": dropped("the one quantisation here is fp8_base"),
    "model.low_vram": dropped(_HARDWARE),
    "model.layer_offloading": dropped(_HARDWARE),
    "model.model_kwargs": dropped(_NONE),
    "model.dtype": dropped("train.dtype decides the precision"),
    "model.vae_path": option("ae"),
    "model.assistant_lora_path": option("base_weights", lambda value: [value], "merged into the model, as there"),
    "model.lora_path": option("base_weights", lambda value: [value]),
    **dict.fromkeys(
        ("model.is_v2", "model.is_xl", "model.is_v3", "model.is_v_pred", "model.is_pixart"), dropped(_OTHER)
    ),
    "sample.sample_every": decides("sample_every_n_steps", note="with prompts, unless disable_sampling"),
    "sample.prompts": decides("sample_prompts"),
    "sample.samples": decides("sample_prompts"),
    "sample.width": decides("sample_prompts", note="its flag --w"),
    "sample.height": decides("sample_prompts", note="its flag --h"),
    "sample.seed": decides("sample_prompts", note="its flag --d"),
    "sample.walk_seed": decides("sample_prompts", note="its flag --d: one more a prompt"),
    "sample.guidance_scale": decides("sample_prompts", note="its flag --g"),
    "sample.sample_steps": decides("sample_prompts", note="its flag --s"),
    "sample.neg": dropped("FLUX's own guidance takes no negative prompt"),
    "sample.sampler": dropped("FLUX samples are always drawn with Euler steps"),
    "sample.sample_start_step": dropped("samples are drawn from the first interval on"),
    "sample.network_multiplier": dropped("samples are drawn at full strength"),
    "sample.guidance_rescale": dropped(_NONE),
    "sample.format": dropped("samples are PNG"),
    "sample.ext": dropped("samples are PNG"),
    "sample.num_frames": dropped(_OTHER),
    "sample.fps": dropped(_OTHER),
    "logging.log_every": dropped("every step is logged"),
    "logging.verbose": dropped("see console_log_level"),
    "logging.use_ui_logger": dropped(_NONE),
    "logging.use_wandb": decides("log_with"),
    "logging.project_name": option("log_tracker_name"),
    "logging.run_name": option("wandb_run_name"),
}  # fmt: skip
SETS: Table = {
    "folder_path": dataset("image_dir"),
    "dataset_path": dataset("image_dir"),
    "caption_ext": dataset("caption_extension", _extension),
    "caption_type": dataset("caption_extension", _extension),
    "caption_dropout_rate": dataset("caption_dropout_rate"),
    "token_dropout_rate": dataset("caption_tag_dropout_rate"),
    "shuffle_tokens": dataset("shuffle_caption", common.truth),
    "keep_tokens": dataset("keep_tokens"),
    "default_caption": dataset("class_tokens", same, "for pictures without a caption"),
    "resolution": decides(DATASET + "resolution", note="several: as many datasets over the folder"),
    "bucket_tolerance": decides(DATASET + "bucket_reso_steps", note="multiples of 16"),
    "buckets": decides(DATASET + "enable_bucket"),
    "num_repeats": dataset("num_repeats"),
    "flip_x": dataset("flip_aug", common.truth),
    "random_crop": dataset("random_crop", common.truth),
    "is_reg": dataset("is_reg", common.truth),
    "alpha_mask": dataset("alpha_mask", common.truth, "with masked_loss"),
    "mask_path": dataset("conditioning_data_dir", same, "with masked_loss"),
    "trigger_word": dataset("trigger_word"),
    "cache_latents": decides("cache_latents"),
    "cache_latents_to_disk": decides("cache_latents_to_disk"),
    "mask_min_value": dropped("masks are used as they are"),
    "invert_mask": dropped("white is what is learnt; invert the pictures"),
    "flip_y": dropped(_NONE),
    "network_weight": dropped("each picture counts the same"),
    **dict.fromkeys(
        (
            *("control_path", "augments", "augmentations", "shuffle_augmentations", "random_scale", "scale"),
            *("random_triggers", "poi", "type", "prior_reg", "clip_image_path", "unconditional_path"),
            *("inpaint_path", "dataset_config", "square_crop"),
        ),
        dropped(_NONE),
    ),
    **dict.fromkeys(("num_frames", "shrink_video_to_frames", "do_i2v", "fps"), dropped(_OTHER)),
}  # fmt: skip
JOB: Table = {
    "job": decides(note="must be extension"),
    "config.name": decides("output_name", "output_dir"),
    "config.process": decides(note="its first one that trains"),
    "meta": dropped("metadata_title and its like take its place"),
}
