"""Presets of the kohya_ss GUI (JSON). They hold options under their own names, and the GUI's fields beside them.

What the GUI does on the way to the trainer is done here: a field left at zero is not passed on, the LoRA type
becomes a network module, ranks and blocks become network_args, and the length follows from steps or epochs.
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping
from typing import Any

from library.config import cli
from library.config.importers.rules import (
    ARGUMENT,
    READ,
    Draft,
    Imported,
    Rule,
    Table,
    argument,
    decides,
    dropped,
    is_off,
    option,
    translate,
)
from library.config.notices import Notices
from library.config.train_config import OPTIONS
from library.errors import ConfigError

KIND = "kohya_ss GUI"
_LAUNCH = "it belongs to accelerate launch; give it there"
_GUI = "it only concerns the GUI"
_OTHER = "it belongs to another model family"
_NOT_PASSED = "the GUI does not pass it on for FLUX"
_TUNING = "it belongs to full fine-tuning"

_LYCORIS = {
    "LyCORIS/LoCon": "locon",
    "LyCORIS/LoHa": "loha",
    "LyCORIS/LoKr": "lokr",
    "LyCORIS/BOFT": "boft",
    "LyCORIS/Diag-OFT": "diag-oft",
    "LyCORIS/DyLoRA": "dylora",
    "LyCORIS/GLoRA": "glora",
    "LyCORIS/iA3": "ia3",
    "LyCORIS/Native Fine-Tuning": "full",
}
_FULL_MATRIX = 10_000  # the rank by which users of LyCORIS ask for LoKr's full matrix
# Fields that become network_args, by the types they count for.
_FLUX_LORA = (
    *("split_qkv", "train_t5xxl", "train_double_block_indices", "train_single_block_indices", "in_dims"),
    *("img_attn_dim", "img_mlp_dim", "img_mod_dim", "txt_attn_dim", "txt_mlp_dim", "txt_mod_dim"),
    *("single_dim", "single_mod_dim"),
)
_GGPO = ("ggpo_beta", "ggpo_sigma")
_ANY_LORA = (
    *("rank_dropout", "module_dropout", "loraplus_lr_ratio", "loraplus_unet_lr_ratio"),
    "loraplus_text_encoder_lr_ratio",
)
_LYCORIS_FIELDS = {
    "LyCORIS_preset": "preset",
    "conv_dim": "conv_dim",
    "conv_alpha": "conv_alpha",
    "use_tucker": "use_tucker",
    "use_scalar": "use_scalar",
    "train_norm": "train_norm",
    "dora_wd": "dora_wd",
    "bypass_mode": "bypass_mode",
    "rank_dropout_scale": "rank_dropout_scale",
}
_OF_ALGORITHM = {
    "factor": ("lokr", "factor"),
    "decompose_both": ("lokr", "decompose_both"),
    "use_cp": ("lokr", "use_cp"),
    "constrain": ("boft, diag-oft", "constraint"),
    "rescaled": ("boft, diag-oft", "rescaled"),
    "train_on_input": ("ia3", "train_on_input"),
    "unit": ("dylora", "block_size"),
}

SPECIAL: Table = {
    "LoRA_type": decides("network_module", ARGUMENT + "algo"),
    "flux1_checkbox": decides(note="must be on: presets of other models are refused"),
    "max_resolution": option("resolution"),
    "optimizer": option("optimizer_type"),
    "flux1_cache_text_encoder_outputs": option("cache_text_encoder_outputs"),
    "flux1_cache_text_encoder_outputs_to_disk": option("cache_text_encoder_outputs_to_disk"),
    "flux1_clip_l": option("clip_l"),
    "flux1_t5xxl": option("t5xxl"),
    "epoch": decides("max_train_epochs", note="used when neither steps nor epochs are given elsewhere"),
    "max_train_steps": decides("max_train_steps", note="max_train_epochs wins over it"),
    "max_train_epochs": decides("max_train_epochs"),
    "lr_warmup": decides("lr_warmup_steps", note="per cent of all steps; lr_warmup_steps wins over it"),
    "lr_warmup_steps": decides("lr_warmup_steps", note="not with lr_scheduler constant"),
    "text_encoder_lr": decides("text_encoder_lr", "network_train_unet_only", note="0 leaves the text encoders alone"),
    "t5xxl_lr": decides("text_encoder_lr", note="the second value"),
    "optimizer_args": decides("optimizer_args", note="split at blanks"),
    "lr_scheduler_args": decides("lr_scheduler_args", note="split at blanks"),
    "network_args": decides("network_args", note="split at blanks"),
    "additional_parameters": decides(note="read as a command line"),
    "xformers": decides("sdpa", "xformers", note="`attention` chooses the kernel"),
    "train_blocks": decides(ARGUMENT + "train_blocks", note="only with split_mode, as in the GUI"),
    "train_lora_ggpo": decides(note="switches ggpo_beta and ggpo_sigma on"),
    **{name: decides(ARGUMENT + name, note="with LoRA_type Flux1") for name in _FLUX_LORA},
    **{name: decides(ARGUMENT + name, note="with train_lora_ggpo") for name in _GGPO},
    **{name: argument(name) for name in _ANY_LORA},
    **{key: decides(ARGUMENT + name, note="with a LyCORIS type") for key, name in _LYCORIS_FIELDS.items()},
    **{key: decides(ARGUMENT + name, note=f"with LyCORIS {algo}") for key, (algo, name) in _OF_ALGORITHM.items()},
    "noise_offset_type": dropped("FLUX is trained with plain Gaussian noise"),
    "mem_eff_save": dropped(_TUNING),
    "lowvram": dropped("it was removed from Kohya's trainer; lowram is another option"),
    "stop_text_encoder_training": dropped("Kohya's trainer no longer has it"),
    "double_blocks_to_swap": dropped("blocks_to_swap took its place"),
    "single_blocks_to_swap": dropped("blocks_to_swap took its place"),
    "enable_all_linear": decides(ARGUMENT + "enable_all_linear", note="with LoRA_type Flux1 OFT"),
    "clip_skip": dropped(_OTHER),
    "max_token_length": dropped(_OTHER),
    **dict.fromkeys(("model_list", "save_as_bool", "training_preset"), dropped(_GUI)),
    **dict.fromkeys(
        (
            *("dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph", "extra_accelerate_launch_args"),
            *("gpu_ids", "num_cpu_threads_per_process", "main_process_port", "multi_gpu", "num_machines"),
            "num_processes",
        ),
        dropped(_LAUNCH),
    ),
    **dict.fromkeys(
        (
            *("sdxl", "sdxl_cache_text_encoder_outputs", "sdxl_no_half_vae", "no_half_vae", "clip_g"),
            *("clip_g_dropout_rate", "save_clip", "save_t5xxl", "t5xxl_device", "t5xxl_dtype"),
            *("pos_emb_random_crop_rate", "no_token_padding", "sd3_checkbox", "sd3_clip_l", "sd3_t5xxl"),
            *("sd3_cache_text_encoder_outputs", "sd3_cache_text_encoder_outputs_to_disk"),
            *("sd3_clip_l_dropout_rate", "sd3_t5_dropout_rate", "sd3_disable_mmap_load_safetensors"),
            *("sd3_enable_scaled_pos_embed", "sd3_fused_backward_pass", "sd3_text_encoder_batch_size"),
            *("block_alphas", "block_dims", "block_lr_zero_threshold", "conv_block_alphas"),
            *("conv_block_dims", "down_lr_weight", "mid_lr_weight", "up_lr_weight", "gemma2"),
        ),
        dropped(_OTHER),
    ),
    **dict.fromkeys(
        (
            *("blockwise_fused_optimizers", "flux_fused_backward_pass", "fused_optimizer_groups"),
            *("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "disable_mmap_load_safetensors"),
        ),
        dropped(_TUNING),
    ),
    **dict.fromkeys(
        ("sigmoid_scale", "weighting_scheme", "logit_mean", "logit_std", "mode_scale"), dropped(_NOT_PASSED)
    ),
}  # fmt: skip
KEYS: Table = {**{name: option(name) for name, item in OPTIONS.items() if item.section != "run"}, **SPECIAL}


def recognises(content: object) -> bool:
    """Whether this is a preset of the GUI: it has fields that only the GUI writes."""
    signs = {
        "LoRA_type",
        "flux1_checkbox",
        "LyCORIS_preset",
        "model_list",
        "sdxl_no_half_vae",
        "save_as_bool",
    }
    return isinstance(content, dict) and bool(signs & content.keys())


def convert(content: Mapping[str, Any]) -> Imported:
    """A preset as options. Raises ConfigError for a preset of another model family or an unknown LoRA type."""
    _must_be_flux(content)
    draft = Draft(KIND)
    draft.use("flux1_checkbox", True, READ)
    own = {"flux1_checkbox"}
    passed = {}
    for key, value in content.items():
        if key in own:
            continue
        rule = KEYS.get(key)
        if rule is not None and not rule.is_dropped and is_off(value):
            reason = _left_at_zero(rule, value)
            draft.drop(key, value, reason or "not set", matters=bool(reason))
        else:
            passed[key] = value
    optimizer = str(passed.get("optimizer", ""))
    if optimizer.lower() == "came" and importlib.util.find_spec("pytorch_optimizer") is None:
        reason = (
            "CAME needs the package pytorch-optimizer (pip install pytorch-optimizer); AdamW is used instead"
        )
        draft.drop("optimizer", passed.pop("optimizer"), reason)
    translate(draft, KEYS, passed)
    _network(draft, passed)
    _length(draft, passed)
    _warmup(draft, passed)
    _text_encoders(draft, passed)
    _texts(draft, passed)
    return draft.finish()


def _must_be_flux(content: Mapping[str, Any]) -> None:
    if content.get("flux1_checkbox") is True:
        return
    if "flux1_checkbox" not in content and str(content.get("LoRA_type", "")).startswith("Flux1"):
        return
    model = content.get("pretrained_model_name_or_path") or content.get("model_list") or "not named"
    raise ConfigError(
        f"a kohya_ss GUI preset for another model than FLUX.1 (flux1_checkbox is not on; its base model is {model}); "
        "this trainer trains FLUX.1"
    )


def _left_at_zero(rule: Rule, value: object) -> str:
    """What to say of a zero: the GUI does not pass it on, although the option's default is another."""
    known = OPTIONS.get(rule.to[0]) if rule.convert else None
    default = known.row.default if known else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not default:
        return ""
    return f"the GUI passes no zeros on, so {rule.to[0]} stays at {default} as there; give it on the command line for 0"


def _network(draft: Draft, given: Mapping[str, Any]) -> None:
    kind = str(given.get("LoRA_type", "Flux1"))
    algorithm = _LYCORIS.get(kind, "")
    if algorithm:
        draft.set("network_module", "lycoris.kohya", key="LoRA_type")
        draft.argue("algo", algorithm, key="LoRA_type")
        rank = given.get("network_dim", 0)
        if algorithm == "lokr" and isinstance(rank, int) and rank >= _FULL_MATRIX:
            draft.use(
                "network_dim", rank, f"network_dim = {rank}", "beyond the layers' sizes: LoKr's full matrix"
            )
    elif kind == "Flux1 OFT":
        draft.set("network_module", "networks.oft_flux", key="LoRA_type")
    elif kind in ("Flux1", "Standard"):
        note = "" if kind == "Flux1" else "Standard is the LoRA of Stable Diffusion; FLUX's is Flux1"
        draft.set("network_module", "networks.lora_flux", key="LoRA_type", note=note)
    else:
        raise ConfigError(
            f"LoRA_type {kind} is not available for FLUX here; Flux1, Flux1 OFT and {', '.join(_LYCORIS)} are"
        )
    for key, name in _LYCORIS_FIELDS.items():
        _argument(draft, given, key, name, bool(algorithm), "it counts with LyCORIS types only")
    for key, (algorithms, name) in _OF_ALGORITHM.items():
        wanted = bool(algorithm) and algorithm in algorithms.split(", ")
        _argument(draft, given, key, name, wanted, f"it counts with LyCORIS {algorithms} only")
    for key in _FLUX_LORA:
        _argument(draft, given, key, key, kind == "Flux1", "it counts with LoRA_type Flux1 only")
    for key in _GGPO:
        wanted = kind == "Flux1" and given.get("train_lora_ggpo") is True
        _argument(draft, given, key, key, wanted, "it counts with train_lora_ggpo only")
    _argument(
        draft,
        given,
        "enable_all_linear",
        "enable_all_linear",
        kind == "Flux1 OFT",
        "it counts with Flux1 OFT only",
    )
    if "train_lora_ggpo" in given:
        draft.use("train_lora_ggpo", True, "ggpo_beta and ggpo_sigma count")
    swap = bool(given.get("split_mode"))
    _argument(draft, given, "train_blocks", "train_blocks", swap, "the GUI uses it with split_mode only")


def _argument(
    draft: Draft, given: Mapping[str, Any], key: str, name: str, wanted: bool, otherwise: str
) -> None:
    if key not in given:
        return
    if wanted and not (key.endswith("_block_indices") and given[key] == "all"):
        draft.argue(name, given[key], key=key)
    else:
        draft.drop(key, given[key], "all blocks are trained anyway" if wanted else otherwise)


def _length(draft: Draft, given: Mapping[str, Any]) -> None:
    order = (
        ("max_train_epochs", "max_train_epochs"),
        ("max_train_steps", "max_train_steps"),
        ("epoch", "max_train_epochs"),
    )
    chosen = next((key for key, _ in order if key in given), None)
    for key, name in order:
        if key == chosen:
            draft.set(name, given[key], key=key)
        elif key in given:
            draft.drop(key, given[key], f"{chosen} decides the length")


def _warmup(draft: Draft, given: Mapping[str, Any]) -> None:
    if given.get("lr_scheduler", "constant") == "constant":
        for key in ("lr_warmup", "lr_warmup_steps"):
            if key in given:
                draft.drop(key, given[key], "lr_scheduler constant has no warm-up")
    elif "lr_warmup_steps" in given:
        draft.set("lr_warmup_steps", given["lr_warmup_steps"], key="lr_warmup_steps")
        if "lr_warmup" in given:
            draft.drop("lr_warmup", given["lr_warmup"], "lr_warmup_steps is given")
    elif "lr_warmup" in given:
        draft.set("lr_warmup_steps", f"{given['lr_warmup']}%", key="lr_warmup")


def _text_encoders(draft: Draft, given: Mapping[str, Any]) -> None:
    rate = given.get("text_encoder_lr")
    if rate is None:
        if "t5xxl_lr" in given:
            draft.drop("t5xxl_lr", given["t5xxl_lr"], "text_encoder_lr is 0, so no text encoder is trained")
        if "unet_lr" in given:
            draft.assume("network_train_unet_only", True, "text_encoder_lr is 0")
        return
    rates = rate if isinstance(rate, list) else [rate, given.get("t5xxl_lr", rate)]
    draft.set("text_encoder_lr", rates, key="text_encoder_lr")
    if "t5xxl_lr" in given:
        draft.use("t5xxl_lr", given["t5xxl_lr"], "text_encoder_lr, its second value")


def _texts(draft: Draft, given: Mapping[str, Any]) -> None:
    """Fields that hold several values as one text, and the command line that the GUI appends."""
    for key in ("optimizer_args", "lr_scheduler_args"):
        if key in given:
            draft.set(key, _words(given[key]), key=key)
    for word in _words(given.get("network_args", [])):
        name, _, value = word.partition("=")
        draft.argue(name, value, key="network_args")
    attention = str(given.get("xformers", ""))
    if attention in ("sdpa", "xformers", "True"):
        draft.set("sdpa" if attention == "sdpa" else "xformers", True, key="xformers")
    elif attention:
        draft.drop("xformers", attention, "`attention` chooses the kernel")
    if "additional_parameters" in given:
        _more(draft, str(given["additional_parameters"]))


def _words(value: Any) -> list[str]:
    return value if isinstance(value, list) else str(value).replace('"', "").split()


def _more(draft: Draft, text: str) -> None:
    key = "additional_parameters"
    try:
        found = cli.parse(shlex.split(text, posix="\\" not in text), Notices())
    except (ConfigError, ValueError) as error:
        draft.drop(key, text, f"not read: {error}")
        return
    for name, given in found.items():
        if name == "network_args" and isinstance(given.raw, list):
            for word in given.raw:
                argument_name, _, value = str(word).partition("=")
                draft.argue(argument_name, value, key=key)
        else:
            draft.set(name, given.raw, key=key)
