"""SimpleTuner's config.json, with the dataset list, LyCORIS settings and prompt library that it names.

Keys are written without their leading dashes. The files it names are read by the caller and handed over, so
that nothing here opens a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from library.config.importers import common
from library.config.importers.rules import (
    Draft,
    Imported,
    dataset_values,
    is_blank,
    note_dataset_keys,
    translate,
)
from library.config.importers.simpletuner_keys import BACKEND, KEYS
from library.errors import ConfigError

KIND = "SimpleTuner"
Reader = Callable[[str], Any]  # name of a file in the config -> its content
_HUB = "push_to_hub is off"

# flux_lora_target -> layers by diffusers' names. q, k and v (and in single blocks the MLP's entry) are one
# layer here, so an attention's projections come with what they share that layer with.
_TARGETS = {
    "all": r"attn\.",
    "all+ffs": r"attn\.|\.ff|proj_mlp|proj_out",
    "context": r"attn\.(add_|to_add_out)",
    "context+ffs": r"attn\.(add_|to_add_out)|ff_context\.",
    "ai-toolkit": "",
    "tiny": r"single_transformer_blocks\.(7|20)\.proj_out",
    "nano": r"single_transformer_blocks\.7\.proj_out",
}
# Classes of diffusers that LyCORIS presets name -> names of our layers, for LyCORIS's patterns.
_CLASSES = {
    "Attention": ("double_blocks.*.img_attn.*", "double_blocks.*.txt_attn.*", "single_blocks.*.linear1"),
    "FluxAttention": ("double_blocks.*.img_attn.*", "double_blocks.*.txt_attn.*", "single_blocks.*.linear1"),
    "FeedForward": ("double_blocks.*.img_mlp.*", "double_blocks.*.txt_mlp.*"),
    "FluxTransformerBlock": ("double_blocks.*",),
    "FluxSingleTransformerBlock": ("single_blocks.*",),
}
_SCHEDULES = {"sine": "cosine", "constant_with_warmup": "constant_with_warmup"}


def recognises(content: object) -> bool:
    """Whether this is a config.json of SimpleTuner."""
    keys = {str(key).lstrip("-") for key in content} if isinstance(content, dict) else set()
    return "data_backend_config" in keys or {"model_family", "model_type"} <= keys


def convert(content: Mapping[str, Any], read: Reader) -> Imported:
    """A config as options and dataset tables; `read` gives the files it names.

    Raises ConfigError for other models than FLUX.1, other trainings than LoRA, and data that is no folder.
    """
    given = {str(key).lstrip("-").replace("-", "_"): value for key, value in content.items()}
    _must_be_flux_lora(given)
    draft = Draft(KIND)
    translate(draft, KEYS, given)
    _network(draft, given, read)
    _length_and_saving(draft, given)
    _optimizer(draft, given)
    common.set_average(draft, given, "", decay=0.995)
    if "ema_decay" in draft.options and given.get("ema_device") == "cpu":
        draft.set("ema_on_cpu", True, key="ema_device")
    _timesteps(draft, given)
    _precision(draft, given)
    _logging(draft, given)
    _samples(draft, given, read)
    _datasets(draft, given, read)
    why = "what SimpleTuner does with FLUX"
    for name, value in common.FLUX_TARGET.items():
        draft.assume(name, value, why)
    draft.assume("output_name", "pytorch_lora_weights", "the name of its files")
    draft.assume("cache_latents_to_disk", True, why)
    draft.assume("cache_text_encoder_outputs_to_disk", True, why)
    return draft.finish()


def _must_be_flux_lora(given: Mapping[str, Any]) -> None:
    family, kind = str(given.get("model_family", "flux")), str(given.get("model_type", "lora"))
    if family != "flux" or kind != "lora":
        raise ConfigError(
            f"a SimpleTuner config for model_family {family}, model_type {kind}; this trainer trains LoRAs of FLUX.1"
        )


def _network(draft: Draft, given: Mapping[str, Any], read: Reader) -> None:
    flavour = str(given.get("model_flavour") or "dev").removeprefix("krea")
    draft.assume(
        "pretrained_model_name_or_path", f"black-forest-labs/FLUX.1-{flavour or 'dev'}", "its model_flavour"
    )
    if str(given.get("lora_type", "standard")).lower() == "lycoris":
        for key in ("lora_rank", "lora_alpha", "flux_lora_target"):
            if key in given:
                draft.drop(key, given[key], "lycoris_config decides")
        draft.set("network_module", "lycoris.kohya", key="lora_type")
        _lycoris(draft, given.get("lycoris_config"), read)
        return
    draft.set("network_module", "networks.lora_flux", key="lora_type")
    rank = given.get("lora_rank") or 16
    draft.set("network_dim", rank, key="lora_rank")
    draft.set("network_alpha", given.get("lora_alpha") or rank, key="lora_alpha")
    target = str(given.get("flux_lora_target") or "all")
    if target not in _TARGETS:
        draft.drop("flux_lora_target", target, f"known are {', '.join(_TARGETS)}; all layers are trained")
    elif _TARGETS[target]:
        note = (
            "q, k and v, and in single blocks the MLP's entry, are one layer here"
            if "attn" in _TARGETS[target]
            else ""
        )
        draft.argue("target_regex", _TARGETS[target], key="flux_lora_target", note=note)


def _lycoris(draft: Draft, file: Any, read: Reader) -> None:
    if is_blank(file):
        raise ConfigError("lora_type lycoris needs lycoris_config, the file with its settings")
    settings = dict(read(str(file)))
    names = {"algo": "algo", "linear_dim": "", "linear_alpha": "", "multiplier": "", "apply_preset": "preset"}
    draft.set("network_dim", settings.get("linear_dim", 10000), key="lycoris_config linear_dim")
    draft.set("network_alpha", settings.get("linear_alpha", 1), key="lycoris_config linear_alpha")
    draft.argue("algo", settings.get("algo", "lokr"), key="lycoris_config algo")
    multiplier = settings.get("multiplier", 1.0)
    if float(multiplier) != 1:
        draft.drop(
            "lycoris_config multiplier",
            multiplier,
            "an adapter is trained at its full strength; see network_alpha",
        )
    for key, value in settings.items():
        if key not in names:
            draft.argue(key, value, key=f"lycoris_config {key}")
    preset = settings.get("apply_preset")
    if preset:
        draft.argue("preset", json.dumps(_preset(draft, dict(preset))), key="lycoris_config apply_preset")


def _preset(draft: Draft, preset: Mapping[str, Any]) -> dict[str, Any]:
    """A preset over diffusers' classes, as one over the names of our layers."""
    names = [
        pattern
        for one in preset.get("target_module", [])
        for pattern in _patterns(draft, one, "target_module")
    ]
    names += [str(name) for name in preset.get("target_name", [])]
    special = {
        pattern: dict(settings)
        for one, settings in dict(preset.get("module_algo_map", {})).items()
        for pattern in _patterns(draft, one, "module_algo_map")
    }
    special |= {str(name): dict(settings) for name, settings in dict(preset.get("name_algo_map", {})).items()}
    return {
        "enable_conv": False,
        "unet_target_module": [],
        "unet_target_name": list(dict.fromkeys([*names, *special])),
        "use_fnmatch": True,
        "name_algo_map": special,
    }


def _patterns(draft: Draft, name: Any, key: str) -> tuple[str, ...]:
    if name in _CLASSES:
        return _CLASSES[name]
    draft.drop(
        f"lycoris_config apply_preset {key}",
        name,
        f"no layers of FLUX are of this class; known: {', '.join(_CLASSES)}",
    )
    return ()


def _length_and_saving(draft: Draft, given: Mapping[str, Any]) -> None:
    epochs, steps = given.get("num_train_epochs"), given.get("max_train_steps")
    if steps and int(steps) > 0:
        draft.set("max_train_steps", steps, key="max_train_steps")
        if epochs is not None:
            draft.drop("num_train_epochs", epochs, "max_train_steps decides the length")
    elif epochs and int(epochs) > 0:
        draft.set("max_train_epochs", epochs, key="num_train_epochs")
    key = "checkpoint_step_interval" if "checkpoint_step_interval" in given else "checkpointing_steps"
    every = given.get(key)
    if every:
        draft.set("save_every_n_steps", every, key=key)
        draft.set("save_state", True, key=key)
        if given.get("checkpoints_total_limit"):
            limit = "checkpoints_total_limit"
            keep = common.keep_last(given[limit], every, limit)
            draft.set("save_last_n_steps", keep, key=limit)
            draft.set("save_last_n_steps_state", keep, key=limit)
    resume = given.get("resume_from_checkpoint")
    if resume == "latest":
        draft.set(
            "resume", "auto", key="resume_from_checkpoint", note="states of this trainer, not of SimpleTuner"
        )
    elif not is_blank(resume):
        draft.drop(
            "resume_from_checkpoint",
            resume,
            "its checkpoints cannot be resumed; give the LoRA as network_weights",
        )


def _optimizer(draft: Draft, given: Mapping[str, Any]) -> None:
    if not is_blank(given.get("optimizer")):
        common.set_optimizer(draft, "optimizer", given["optimizer"])
    name = str(given.get("lr_scheduler") or "constant")
    note = "nearest" if name == "sine" else ""
    draft.set("lr_scheduler", _SCHEDULES.get(name, name), key="lr_scheduler", note=note)
    if not is_blank(given.get("lr_warmup_steps")):
        if name == "constant":
            draft.drop("lr_warmup_steps", given["lr_warmup_steps"], "lr_scheduler constant has no warm-up")
        else:
            draft.set("lr_warmup_steps", given["lr_warmup_steps"], key="lr_warmup_steps")


def _timesteps(draft: Draft, given: Mapping[str, Any]) -> None:
    for key in ("flow_use_uniform_schedule", "flux_use_uniform_schedule"):
        if common.truth(given.get(key, False)):
            draft.set("timestep_sampling", "uniform", key=key)
            return
    for key in ("flow_schedule_auto_shift", "flux_schedule_auto_shift"):
        if common.truth(given.get(key, False)):
            draft.set("timestep_sampling", "flux_shift", key=key)
            return
    for key in ("flow_schedule_shift", "flux_schedule_shift"):
        if not is_blank(given.get(key)) and common.number(given[key], key) == 0:
            draft.set("timestep_sampling", "sigmoid", key=key, note="0 is no shift")
        elif not is_blank(given.get(key)):
            draft.set("timestep_sampling", "shift", key=key)
            draft.set("discrete_flow_shift", given[key], key=key)
    if "timestep_sampling" not in draft.options:
        why = "SimpleTuner's default; its first versions had no shift, which is sigmoid"
        draft.assume("timestep_sampling", "shift", why)
        draft.assume("discrete_flow_shift", 3.0, why)


def _precision(draft: Draft, given: Mapping[str, Any]) -> None:
    base = given.get("base_model_precision")
    if base not in (None, "", "no_change", "bf16", "fp16", "fp32"):
        draft.set("fp8_base", True, key="base_model_precision", note=f"float8 storage stands in for {base}")
    draft.assume("mixed_precision", "bf16", "SimpleTuner's default")


def _logging(draft: Draft, given: Mapping[str, Any]) -> None:
    report = str(given.get("report_to") or "none")
    on = report != "none"
    if on:
        draft.set("log_with", report, key="report_to")
        draft.set("logging_dir", f"{given.get('output_dir', 'output')}/logs", key="report_to")
    for key, name in (("tracker_project_name", "log_tracker_name"), ("tracker_run_name", "wandb_run_name")):
        if is_blank(given.get(key)):
            continue
        if on and (name == "log_tracker_name" or report in ("wandb", "all")):
            draft.set(name, given[key], key=key)
        else:
            draft.drop(key, given[key], "nothing is reported" if not on else "it belongs to Weights & Biases")
    if common.truth(given.get("push_to_hub", False)):
        draft.set("huggingface_repo_id", given.get("hub_model_id", ""), key="hub_model_id")
    else:
        for key in ("push_to_hub", "hub_model_id"):
            if key in given:
                draft.drop(key, given[key], _HUB)


def _samples(draft: Draft, given: Mapping[str, Any], read: Reader) -> None:
    prompts = (
        common.text_lines(given["validation_prompt"]) if not is_blank(given.get("validation_prompt")) else []
    )
    if not is_blank(given.get("user_prompt_library")):
        library = read(str(given["user_prompt_library"]))
        prompts += common.text_lines(
            [one.get("prompt", "") if isinstance(one, dict) else one for one in library.values()]
        )
    key = "validation_step_interval" if "validation_step_interval" in given else "validation_steps"
    if not prompts or not given.get(key):
        return
    size = str(given.get("validation_resolution") or "1024").lower().split(",")[0].split("x")
    picture = common.Picture(
        width=int(common.number(size[0], "validation_resolution")),
        height=int(common.number(size[-1], "validation_resolution")),
        steps=int(given.get("validation_num_inference_steps") or 20),
        guidance=common.number(given.get("validation_guidance") or 3.0, "validation_guidance"),
        seed=None if is_blank(given.get("validation_seed")) else int(given["validation_seed"]),
    )
    draft.set("sample_prompts", common.prompt_lines(prompts, picture), key="validation_prompt")
    draft.set("sample_every_n_steps", given[key], key=key)


def _datasets(draft: Draft, given: Mapping[str, Any], read: Reader) -> None:
    file = given.get("data_backend_config")
    if is_blank(file):
        raise ConfigError("data_backend_config is missing: the file with the list of datasets")
    backends = read(str(file))
    if not isinstance(backends, list):
        raise ConfigError(f"data_backend_config {file}: the content is not a list of datasets")
    alignment = given.get("aspect_bucket_alignment") or 64
    step = max(16, int(common.number(alignment, "aspect_bucket_alignment")) // 16 * 16)  # FLUX takes no less
    images = []
    for position, backend in enumerate(backends, 1):
        name = str(backend.get("id", position))
        kind = str(backend.get("dataset_type") or "image")
        if kind != "image" or common.truth(backend.get("disabled", False)):
            reason = BACKEND["dataset_type"].note if kind != "image" else "it is disabled"
            draft.drop(f"{file} {name}", kind, reason)
            continue
        note_dataset_keys(draft, BACKEND, backend, name)
        if str(backend.get("type", "local")) != "local":
            raise ConfigError(
                f"dataset {name} is of type {backend['type']}: only local folders can be read here"
            )
        images.append((name, {**_inherited(given), **backend}))
    for name, backend in sorted(
        images, key=lambda one: common.truth(one[1].get("is_regularisation_data", False))
    ):
        _dataset(draft, name, backend, step=step)


def _inherited(given: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "resolution",
        "resolution_type",
        "caption_strategy",
        "instance_prompt",
        "prepend_instance_prompt",
    )
    return {name: given[name] for name in names if name in given}


def _dataset(draft: Draft, name: str, backend: Mapping[str, Any], *, step: int) -> None:
    subset = dataset_values(BACKEND, backend)
    if "image_dir" not in subset:
        raise ConfigError(f"dataset {name} has no instance_data_dir, the folder of its pictures")
    strategy = str(backend.get("caption_strategy") or "filename")
    prompt = backend.get("instance_prompt")
    if not is_blank(prompt):
        subset["class_tokens"] = prompt
    if strategy == "instanceprompt":
        subset["caption_extension"] = "none"
    elif strategy == "textfile":
        subset["caption_extension"] = ".txt"
        if common.truth(backend.get("prepend_instance_prompt", False)) and not is_blank(prompt):
            subset["caption_prefix"] = f"{prompt} "
    else:
        draft.drop(f"{name}.caption_strategy", strategy, "captions are read from .txt files here")
        subset["caption_extension"] = ".txt"
    square = (
        common.truth(backend.get("crop", False)) and str(backend.get("crop_aspect", "square")) == "square"
    )
    if str(backend.get("crop_style", "")) == "random":
        draft.drop(f"{name}.crop_style", "random", "latents are cached, so crops are at the centre")
    common.add_dataset(draft, common.buckets(_side(backend, step), step=step, by_aspect=not square), subset)


def _side(backend: Mapping[str, Any], step: int) -> int:
    """The side of a square of the dataset's area, in pixels."""
    size = common.number(backend.get("resolution") or 1024, "resolution")
    if str(backend.get("resolution_type", "pixel_area")) == "area":
        return max(step, round(math.sqrt(size * 1e6) / step) * step)
    return int(size)
