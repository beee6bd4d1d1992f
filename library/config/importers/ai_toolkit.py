"""Job files of ai-toolkit (YAML or JSON): one process that trains a FLUX.1 LoRA.

Keys are written with dots from the process on ("train.lr"). Its datasets with several resolutions are several
datasets over one folder here, as they are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from library.config.importers import common
from library.config.importers.ai_toolkit_keys import JOB, PROCESS, SETS
from library.config.importers.rules import (
    READ,
    Draft,
    Imported,
    dataset_values,
    note_dataset_keys,
    shown,
    translate,
)
from library.errors import ConfigError

KIND = "ai-toolkit"
FULL_RANK = 100_000  # LyCORIS takes any rank beyond a layer's size for the full matrix
_TIMESTEPS = {
    "sigmoid": "sigmoid",
    "linear": "uniform",
    "weighted": "uniform",
    "shift": "flux_shift",
    "flux_shift": "flux_shift",
    "lumina2_shift": "flux_shift",
    "lognorm_blend": "sigmoid",
}
_INEXACT_TIMESTEPS = {
    "weighted": "the weights of its loss have no counterpart",
    "lognorm_blend": "nearest",
    "lumina2_shift": "nearest",
}


def recognises(content: object) -> bool:
    """Whether this is a job file: `config` with processes."""
    config = content.get("config") if isinstance(content, dict) else None
    return isinstance(config, dict) and isinstance(config.get("process"), list)


def convert(content: Mapping[str, Any]) -> Imported:
    """A job as options and dataset tables. Raises ConfigError if it trains something else than FLUX.1."""
    config = content["config"]
    process = next((one for one in config["process"] if isinstance(one, dict)), None)
    if process is None:
        raise ConfigError("an ai-toolkit job whose config.process is empty: nothing says what to train")
    name = str(config.get("name") or "lora")
    draft = Draft(KIND)
    flat = _flat({key: value for key, value in process.items() if key != "datasets"})
    _must_be_flux(flat)
    draft.set("output_name", name, key="config.name")
    folder = str(process.get("training_folder", "output")).rstrip("/")
    draft.set("output_dir", f"{folder}/{name}", key="training_folder")
    for key in ("job", "meta"):
        if key in content:
            if JOB[key].is_dropped:
                draft.drop(key, content[key], JOB[key].note)
            else:
                draft.use(key, content[key], READ)
    translate(draft, PROCESS, {key: value for key, value in flat.items() if key != "training_folder"})
    _network(draft, flat)
    _precision_and_text(draft, flat)
    _timesteps(draft, flat)
    _saving(draft, flat)
    common.set_average(draft, flat, "train.ema_config.", decay=0.999)
    _samples(draft, flat)
    datasets = process.get("datasets") or []
    _datasets(draft, datasets if isinstance(datasets, list) else [datasets], flat)
    _own_defaults(draft)
    return draft.finish()


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables with dotted keys; dictionaries of free form stay whole."""
    whole = ("optimizer_params", "lr_scheduler_params", "model_kwargs", "quantize_kwargs")
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict) and key not in whole:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _must_be_flux(flat: Mapping[str, Any]) -> None:
    kind = str(flat.get("type", "sd_trainer"))
    if "trainer" not in kind:
        raise ConfigError(
            f"an ai-toolkit job of type {kind}, which trains no LoRA; sd_trainer jobs can be read"
        )
    arch = flat.get("model.arch")
    model = str(flat.get("model.name_or_path", ""))
    other = next((key for key in ("is_xl", "is_v2", "is_v3", "is_pixart") if flat.get(f"model.{key}")), None)
    if arch not in (None, "flux") or other:
        raise ConfigError(
            f"an ai-toolkit job for another model than FLUX.1 ({f'arch {arch}' if arch else other}); "
            "this trainer trains FLUX.1"
        )
    if arch is None and "model.is_flux" not in flat and "flux" not in model.lower():
        raise ConfigError(
            f"an ai-toolkit job that does not say it is for FLUX.1 (model {model}): set is_flux: true"
        )


def _network(draft: Draft, flat: Mapping[str, Any]) -> None:
    kind = str(flat.get("network.type", "lora")).lower()
    if kind not in ("lora", "locon", "lokr"):
        raise ConfigError(f"network.type {kind} is not available here; lora and lokr are")
    draft.set(
        "network_module", "lycoris.kohya" if kind == "lokr" else "networks.lora_flux", key="network.type"
    )
    if kind == "lokr":
        draft.argue("algo", "lokr", key="network.type")
    rank = flat.get("network.rank") or flat.get("network.linear") or 4
    alpha = flat.get("network.linear_alpha", flat.get("network.alpha", 1.0))
    key = "network.rank" if flat.get("network.rank") else "network.linear"
    full = kind == "lokr" and common.truth(flat.get("network.lokr_full_rank", True))
    if full:
        draft.use(key, rank, "nothing", "lokr_full_rank makes the full matrix of any rank")
        draft.set("network_dim", FULL_RANK, key="network.lokr_full_rank")
        draft.set(
            "network_alpha", FULL_RANK, key="network.linear_alpha", note="the full matrix is not scaled"
        )
    else:
        draft.set("network_dim", rank, key=key)
        draft.set("network_alpha", alpha, key="network.linear_alpha")


def _precision_and_text(draft: Draft, flat: Mapping[str, Any]) -> None:
    word = str(flat.get("train.dtype", "bf16"))
    precision = common.PRECISIONS.get(word, word)
    draft.set("mixed_precision", "no" if precision == "float" else precision, key="train.dtype")
    trains_text = common.truth(flat.get("train.train_text_encoder", False))
    draft.set("network_train_unet_only", not trains_text, key="train.train_text_encoder")
    if "train.text_encoder_lr" in flat:
        if trains_text:
            draft.set("text_encoder_lr", [flat["train.text_encoder_lr"]], key="train.text_encoder_lr")
        else:
            draft.drop("train.text_encoder_lr", flat["train.text_encoder_lr"], "no text encoder is trained")
    if "train.optimizer" in flat:
        common.set_optimizer(draft, "train.optimizer", flat["train.optimizer"])


def _timesteps(draft: Draft, flat: Mapping[str, Any]) -> None:
    keys = ("train.timestep_type", "train.linear_timesteps", "train.content_or_style")
    chosen = next((key for key in keys if key in flat), None)
    for key in keys:
        if key in flat and key != chosen:
            draft.drop(key, flat[key], f"{chosen} decides the timesteps")
    if chosen == "train.linear_timesteps":
        name = "uniform" if common.truth(flat[chosen]) else "sigmoid"
        draft.set("timestep_sampling", name, key=chosen)
    elif chosen == "train.content_or_style":
        # Without a timestep_type, its FLUX trainer draws from the sigmoid of a normal number.
        draft.set("timestep_sampling", "sigmoid", key=chosen)
    elif chosen:
        word = str(flat[chosen])
        sampling = _TIMESTEPS.get(word, word)
        draft.set("timestep_sampling", sampling, key=chosen, note=_INEXACT_TIMESTEPS.get(word, ""))


def _saving(draft: Draft, flat: Mapping[str, Any]) -> None:
    every = flat.get("save.save_every")
    if "save.max_step_saves_to_keep" in flat and every:
        key = "save.max_step_saves_to_keep"
        steps = common.keep_last(flat[key], every, key)
        draft.set("save_last_n_steps", steps, key=key)
        draft.set("save_last_n_steps_state", steps, key=key)
    if common.truth(flat.get("save.push_to_hub", False)):
        draft.set("huggingface_repo_id", flat.get("save.hf_repo_id", ""), key="save.hf_repo_id")
        visibility = "private" if common.truth(flat.get("save.hf_private", False)) else "public"
        draft.set("huggingface_repo_visibility", visibility, key="save.hf_private")
    else:
        for key in ("save.push_to_hub", "save.hf_repo_id", "save.hf_private"):
            if key in flat:
                draft.drop(key, flat[key], "push_to_hub is off")
    if common.truth(flat.get("logging.use_wandb", False)):
        draft.set("log_with", "wandb", key="logging.use_wandb")
        draft.assume("logging_dir", f"{draft.options['output_dir']}/logs", "where the logs of the run lie")


def _samples(draft: Draft, flat: Mapping[str, Any]) -> None:
    own = flat.get("sample.prompts") or [
        one.get("prompt", "") if isinstance(one, dict) else one for one in flat.get("sample.samples") or []
    ]
    keys = [
        key for key in flat if key.startswith("sample.") and key in PROCESS and not PROCESS[key].is_dropped
    ]
    off = common.truth(flat.get("train.disable_sampling", False))
    if off or not own or not flat.get("sample.sample_every", 100):
        for key in keys:
            draft.drop(key, flat[key], "disable_sampling is on" if off else "no sample is drawn")
        return
    seed = flat.get("sample.seed", 42)
    picture = common.Picture(
        width=int(flat.get("sample.width", 1024)),
        height=int(flat.get("sample.height", 1024)),
        steps=int(flat.get("sample.sample_steps", 20)),
        guidance=common.number(flat.get("sample.guidance_scale", 4), "sample.guidance_scale"),
        seed=int(seed),
        walk_seed=common.truth(flat.get("sample.walk_seed", False)),
    )
    lines = common.prompt_lines(common.text_lines(own), picture, str(flat.get("trigger_word") or ""))
    draft.set("sample_prompts", lines, key="sample.prompts")
    draft.set("sample_every_n_steps", flat.get("sample.sample_every", 100), key="sample.sample_every")
    first = not common.truth(flat.get("train.skip_first_sample", False))
    draft.set("sample_at_first", first, key="train.skip_first_sample")
    for key in keys:
        if key not in ("sample.prompts", "sample.sample_every"):
            draft.use(key, flat[key], "sample_prompts")


def _datasets(draft: Draft, sets: list[Any], flat: Mapping[str, Any]) -> None:
    for position, given in enumerate(sets, 1):
        if not isinstance(given, dict):
            raise ConfigError(f"datasets: entry {position} is not a table of keys but {shown(given)}")
    regularisation_last = sorted(
        enumerate(sets, 1), key=lambda one: common.truth(one[1].get("is_reg", False))
    )
    subsets = [_dataset(draft, given, position) for position, given in regularisation_last]
    if any(subset.get("alpha_mask") or subset.get("conditioning_data_dir") for subset in subsets):
        draft.assume("masked_loss", True, "its datasets have masks")
    if not any(subset.get("random_crop") for subset in subsets):
        to_disk = any(common.truth(given.get("cache_latents_to_disk", False)) for given in sets)
        draft.set("cache_latents_to_disk" if to_disk else "cache_latents", True, key="datasets.cache_latents")
    if not common.truth(flat.get("train.train_text_encoder", False)):
        why = "captions are encoded once; text encoders then need no memory"
        draft.assume("cache_text_encoder_outputs", True, why)


def _dataset(draft: Draft, given: Mapping[str, Any], position: int) -> dict[str, object]:
    """Add one dataset for each of its resolutions; returns the subset that they share."""
    note_dataset_keys(draft, SETS, given, f"datasets[{position}]")
    subset = dataset_values(SETS, given)
    if "image_dir" not in subset:
        raise ConfigError(f"datasets: entry {position} has no folder_path, the folder of its pictures")
    step = max(16, int(given.get("bucket_tolerance") or 64) // 16 * 16)
    by_aspect = common.truth(given.get("buckets", True))
    for side in common.resolutions(given.get("resolution", 512), "resolution"):
        common.add_dataset(draft, common.buckets(side, step=step, by_aspect=by_aspect), subset)
    return subset


def _own_defaults(draft: Draft) -> None:
    why = "what ai-toolkit does with FLUX"
    for name, value in common.FLUX_TARGET.items():
        draft.assume(name, value, why)
    draft.assume("timestep_sampling", "sigmoid", why)
    draft.assume("gradient_checkpointing", True, why)
    draft.assume("optimizer_type", "AdamW", why)
    draft.assume("lr_scheduler", "constant", why)
    draft.assume("resume", "auto", "a job that is started again goes on, as there")
    draft.assume("save_state", True, "so that it can go on")
