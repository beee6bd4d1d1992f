"""Arguments of `create-training-config`, the tool of an ai-toolkit server (JSON): a flat list of settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from library.config.importers import common
from library.config.importers.rules import (
    DATASET,
    Draft,
    Imported,
    Table,
    decides,
    dropped,
    is_blank,
    option,
    translate,
)
from library.errors import ConfigError

KIND = "ai-toolkit server"
TOOL = "create-training-config"
_PRIOR = "no class pictures are generated; give some as a subset with is_reg in a dataset_config file"
_OTHER = "it belongs to another model family"

KEYS: Table = {
    "name": decides("output_name", "output_dir", note="output_dir is output/ and the name"),
    "model_name": option("pretrained_model_name_or_path"),
    "dataset_path": decides(DATASET + "image_dir"),
    "resolution": decides(DATASET + "resolution", note="several: as many datasets over the folder"),
    "batch_size": option("train_batch_size"),
    "learning_rate": option("learning_rate"),
    "steps": option("max_train_steps"),
    "rank": decides("network_dim", note="wins over network_dim"),
    "alpha": decides("network_alpha", note="wins over network_alpha"),
    "network_dim": decides("network_dim"),
    "network_alpha": decides("network_alpha"),
    "dropout": option("network_dropout"),
    "trigger_word": option("trigger_word"),
    "instance_prompt": decides(DATASET + "class_tokens", note="for pictures without a caption"),
    "caption_dropout_rate": option("caption_dropout_rate"),
    "test_prompts": decides("sample_prompts"),
    "sample_prompts": decides("sample_prompts"),
    "sample_every": decides("sample_every_n_steps", note="with prompts, unless disable_sampling"),
    "disable_sampling": decides("sample_every_n_steps"),
    "save_every": option("save_every_n_steps"),
    "gradient_accumulation_steps": option("gradient_accumulation_steps"),
    "gradient_checkpointing": option("gradient_checkpointing"),
    "optimizer": decides("optimizer_type"),
    "lr_scheduler": option("lr_scheduler"),
    "lr_warmup_steps": decides("lr_warmup_steps", note="not with lr_scheduler constant"),
    "mixed_precision": option("mixed_precision"),
    "cache_latents": option("cache_latents"),
    "cache_latents_to_disk": option("cache_latents_to_disk"),
    "low_vram": option("fp8_base", common.truth, "float8 storage is what saves most memory here"),
    "prior_loss_weight": option("prior_loss_weight"),
    "prior_preservation_weight": option("prior_loss_weight"),
    "seed": option("seed"),
    "resume_from": dropped("an adapter to start from is network_weights; a state of ours is resume"),
    "prior_preservation": dropped(_PRIOR),
    "class_prompt": dropped(_PRIOR),
    "num_class_images": dropped(_PRIOR),
    "clip_skip": dropped(_OTHER),
    "max_token_length": dropped(_OTHER),
}


def recognises(content: object) -> bool:
    """Whether these are the tool's arguments, by themselves or in a call of it."""
    if not isinstance(content, dict):
        return False
    return content.get("tool") == TOOL or (
        "dataset_path" in content and bool({"model_name", "steps"} & content.keys())
    )


def convert(content: Mapping[str, Any]) -> Imported:
    """The arguments as options and dataset tables. Raises ConfigError for a missing dataset_path."""
    given = content.get("arguments", {}) if "tool" in content else content
    draft = Draft(KIND)
    translate(draft, KEYS, given)
    name = str(given.get("name") or "lora")
    draft.set("output_name", name, key="name")
    draft.set("output_dir", f"output/{name}", key="name")
    for option_name, keys in (
        ("network_dim", ("rank", "network_dim")),
        ("network_alpha", ("alpha", "network_alpha")),
    ):
        chosen = next((key for key in keys if not is_blank(given.get(key))), None)
        if chosen:
            draft.set(option_name, given[chosen], key=chosen)
        if chosen == keys[0] and keys[1] in given:
            draft.drop(keys[1], given[keys[1]], f"{chosen} = {given[chosen]} is given as well and counts")
    if not is_blank(given.get("optimizer")):
        common.set_optimizer(draft, "optimizer", given["optimizer"])
    if not is_blank(given.get("lr_warmup_steps")):
        if given.get("lr_scheduler", "constant") == "constant":
            draft.drop("lr_warmup_steps", given["lr_warmup_steps"], "lr_scheduler constant has no warm-up")
        else:
            draft.set("lr_warmup_steps", given["lr_warmup_steps"], key="lr_warmup_steps")
    _samples(draft, given)
    _dataset(draft, given)
    _own_defaults(draft)
    return draft.finish()


def _samples(draft: Draft, given: Mapping[str, Any]) -> None:
    keys = ("sample_prompts", "test_prompts")
    chosen = next((key for key in keys if not is_blank(given.get(key))), None)
    if chosen is None or common.truth(given.get("disable_sampling", False)):
        return
    lines = common.prompt_lines(
        common.text_lines(given[chosen]), common.Picture(seed=42), str(given.get("trigger_word") or "")
    )
    draft.set("sample_prompts", lines, key=chosen)
    draft.set("sample_every_n_steps", given.get("sample_every") or 250, key="sample_every")


def _dataset(draft: Draft, given: Mapping[str, Any]) -> None:
    folder = given.get("dataset_path")
    if is_blank(folder):
        raise ConfigError("dataset_path is missing: the folder of the pictures")
    subset: dict[str, Any] = {"image_dir": folder}
    if not is_blank(given.get("instance_prompt")):
        subset["class_tokens"] = given["instance_prompt"]
    for side in common.resolutions(given.get("resolution") or 512, "resolution"):
        common.add_dataset(draft, common.buckets(side), subset)


def _own_defaults(draft: Draft) -> None:
    why = "what an ai-toolkit server does with FLUX"
    for name, value in common.FLUX_TARGET.items():
        draft.assume(name, value, why)
    draft.assume("network_module", "networks.lora_flux", why)
    draft.assume("timestep_sampling", "sigmoid", why)
    draft.assume("gradient_checkpointing", True, why)
    draft.assume("mixed_precision", "bf16", why)
    draft.assume("cache_latents", True, "pictures do not change, so they are encoded once")
    draft.assume("cache_text_encoder_outputs", True, "captions do not change, so they are encoded once")
