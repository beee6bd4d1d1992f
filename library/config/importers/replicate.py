"""Inputs of Replicate's FLUX trainer (JSON): what its training form and its API take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from library.config.importers import common
from library.config.importers.rules import (
    DATASET,
    Draft,
    Imported,
    Table,
    argument,
    decides,
    dropped,
    is_blank,
    option,
    translate,
)
from library.errors import ConfigError

KIND = "Replicate"
_CAPTIONS = (
    "there is no captioning model here; a picture without a .txt file has the trigger word as its caption"
)
_ONLY_WITH_KEY = "Replicate uses it only with wandb_api_key"

KEYS: Table = {
    "input_images": decides(
        DATASET + "image_dir", note="a folder, or a zip file, which is unpacked under output_dir"
    ),
    "trigger_word": decides("trigger_word", "output_name"),
    "steps": option("max_train_steps"),
    "learning_rate": option("learning_rate"),
    "batch_size": option("train_batch_size"),
    "resolution": decides(DATASET + "resolution", note="several: as many datasets over the folder"),
    "lora_rank": decides("network_dim", "network_alpha"),
    "caption_dropout_rate": option("caption_dropout_rate"),
    "optimizer": decides("optimizer_type"),
    "cache_latents_to_disk": decides("cache_latents_to_disk"),
    "layers_to_optimize_regex": argument("target_regex", str, "found in diffusers' names, as there"),
    "gradient_checkpointing": decides(
        "gradient_checkpointing", note="always on, as with less than 100 GB there"
    ),
    "hf_repo_id": option("huggingface_repo_id"),
    "hf_token": option("huggingface_token"),
    "wandb_api_key": decides("wandb_api_key", "log_with"),
    "wandb_project": decides("log_tracker_name", note="with wandb_api_key"),
    "wandb_run": decides("wandb_run_name", note="with wandb_api_key"),
    "wandb_entity": dropped("set WANDB_ENTITY in the environment"),
    "wandb_sample_interval": decides("sample_every_n_steps", note="with wandb_sample_prompts"),
    "wandb_sample_prompts": decides("sample_prompts"),
    "wandb_save_interval": option("save_every_n_steps"),
    "autocaption": dropped(_CAPTIONS),
    "autocaption_prefix": dropped(_CAPTIONS),
    "autocaption_suffix": dropped(_CAPTIONS),
    "skip_training_and_use_pretrained_hf_lora_url": dropped("nothing would be trained"),
}
_DEFAULTS = {
    "max_train_steps": 1000,
    "learning_rate": 4e-4,
    "caption_dropout_rate": 0.05,
    "optimizer_type": "AdamW8bit",
    "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev",
    "network_module": "networks.lora_flux",
    "mixed_precision": "bf16",
    "save_precision": "fp16",
    "timestep_sampling": "sigmoid",
    "gradient_checkpointing": True,
    "cache_text_encoder_outputs": True,
    "output_dir": "output",
}


def recognises(content: object) -> bool:
    """Whether these are the trainer's inputs, by themselves or as `input` of a request."""
    given = content.get("input", content) if isinstance(content, dict) else None
    return isinstance(given, dict) and ("input_images" in given or {"lora_rank", "steps"} <= given.keys())


def convert(content: Mapping[str, Any]) -> Imported:
    """The inputs as options and dataset tables. Raises ConfigError for missing or remote pictures."""
    given = content.get("input", content)
    draft = Draft(KIND)
    translate(draft, KEYS, given)
    word = str(given.get("trigger_word", "TOK") or "").strip()
    if word:
        draft.set("trigger_word", word, key="trigger_word")
    draft.set("output_name", word or "lora", key="trigger_word")
    rank = given.get("lora_rank") or 16
    draft.set("network_dim", rank, key="lora_rank")
    draft.set("network_alpha", rank, key="lora_rank")
    if not is_blank(given.get("optimizer")):
        common.set_optimizer(draft, "optimizer", given["optimizer"])
    _wandb(draft, given)
    _dataset(draft, given, word)
    for name, value in {**_DEFAULTS, **common.FLUX_TARGET}.items():
        draft.assume(name, value, "what Replicate's trainer does")
    return draft.finish()


def _wandb(draft: Draft, given: Mapping[str, Any]) -> None:
    has_key = not is_blank(given.get("wandb_api_key"))
    if has_key:
        draft.set("wandb_api_key", given["wandb_api_key"], key="wandb_api_key")
        draft.set("log_with", "wandb", key="wandb_api_key")
        if draft.options.get("log_with"):
            draft.assume("logging_dir", "output/logs", "where the logs of the run lie")
    for key, name in (("wandb_project", "log_tracker_name"), ("wandb_run", "wandb_run_name")):
        if is_blank(given.get(key)):
            continue
        if has_key:
            draft.set(name, given[key], key=key)
        else:
            draft.drop(key, given[key], _ONLY_WITH_KEY)
    prompts = given.get("wandb_sample_prompts")
    if is_blank(prompts):
        if "wandb_sample_interval" in given:
            draft.drop(
                "wandb_sample_interval", given["wandb_sample_interval"], "there is no wandb_sample_prompts"
            )
        return
    picture = common.Picture(steps=28, seed=42, walk_seed=True)
    lines = common.prompt_lines(common.text_lines(prompts), picture, str(given.get("trigger_word") or ""))
    draft.set("sample_prompts", lines, key="wandb_sample_prompts")
    draft.set("sample_every_n_steps", given.get("wandb_sample_interval") or 100, key="wandb_sample_interval")


def _dataset(draft: Draft, given: Mapping[str, Any], word: str) -> None:
    images = str(given.get("input_images") or "")
    if not images:
        raise ConfigError("input_images is missing: the folder or zip file of the pictures")
    if "://" in images:
        raise ConfigError(
            f"input_images {images} is an address: download the zip file and give its path, or its unpacked folder"
        )
    subset: dict[str, Any] = {"image_dir": images}
    if word:
        subset["class_tokens"] = word
    for side in common.resolutions(given.get("resolution") or "512,768,1024", "resolution"):
        common.add_dataset(draft, common.buckets(side), subset)
    to_disk = common.truth(given.get("cache_latents_to_disk", False))
    draft.set("cache_latents_to_disk" if to_disk else "cache_latents", True, key="cache_latents_to_disk")
