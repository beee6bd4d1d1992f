"""What a launcher or DeepSpeed's own file says about options: sources below the config file and the command line.

`accelerate launch` hands its settings on as environment variables. DeepSpeed's JSON file holds more than options:
what is none goes to the engine as it is (`engine_settings`), and what the run's options decide is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from library.config.cli import Given
from library.config.notices import Notices
from library.errors import ConfigError

ACCELERATE = "accelerate launch"
# Options by the variables that accelerate sets for them
ACCELERATE_VARIABLES = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds_config",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "offload_optimizer_nvme_path",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "offload_param_nvme_path",
}
# Options by their place in zero_optimization of DeepSpeed's file
ZERO_KEYS = {
    ("stage",): "zero_stage",
    ("offload_optimizer", "device"): "offload_optimizer_device",
    ("offload_optimizer", "nvme_path"): "offload_optimizer_nvme_path",
    ("offload_param", "device"): "offload_param_device",
    ("offload_param", "nvme_path"): "offload_param_nvme_path",
}
# Top-level keys of that file that the run's own options decide, with the option to give instead
DECIDED = {
    "train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "optimizer_type",
    "scheduler": "lr_scheduler",
    "bf16": "mixed_precision",
    "fp16": "mixed_precision",
    "amp": "mixed_precision",
    "torch_autocast": "mixed_precision",
    "zero_allow_untested_optimizer": "optimizer_type",
    "zero_force_ds_cpu_optimizer": "optimizer_type",
}
AUTO = "auto"  # accelerate's word for "as the run's options say"


def launcher_options(
    environment: Mapping[str, str], given: Mapping[str, Given], notices: Notices
) -> dict[str, Given]:
    """What launcher and DeepSpeed file set; `given` are options from elsewhere, which name that file first."""
    options = accelerate_options(environment, notices)
    file = given.get("ds_config", options.get("ds_config"))
    if file is not None and file.raw:
        options |= deepspeed_file_options(Path(str(file.raw)), notices)
    return options


def accelerate_options(environment: Mapping[str, str], notices: Notices) -> dict[str, Given]:
    """The options that `accelerate launch --use_deepspeed`, or its config file, stands for."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in ("1", "true", "yes"):
        return {}
    given = {"deepspeed": Given(True, ACCELERATE)}
    for variable, name in ACCELERATE_VARIABLES.items():
        value = environment.get(variable, "")
        if value and value.lower() not in ("none", AUTO):
            given[name] = Given(value, ACCELERATE)
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("", "1", AUTO):
        notices.remarks.append(
            f"accelerate's gradient_accumulation_steps = {steps} counts only as an option of the trainer: "
            "give --gradient_accumulation_steps"
        )
    return given


def deepspeed_file_options(path: Path, notices: Notices) -> dict[str, Given]:
    """The options that a DeepSpeed file sets; what it says that cannot count is named in `notices`."""
    content = read_deepspeed_file(path)
    zero = content.get("zero_optimization", {})
    given: dict[str, Given] = {}
    for keys, name in ZERO_KEYS.items():
        value: Any = zero
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and value not in (AUTO, "none"):
            given[name] = Given(value, f"{path.name} [zero_optimization] {'.'.join(keys)}")
    idle = [f"{key} (give {DECIDED[key]})" for key, value in content.items() if _has_its_say(key, value)]
    if idle:
        notices.remarks.append(f"{path.name}: decided by the options of the run: {', '.join(idle)}")
    return given


def _has_its_say(key: str, value: object) -> bool:
    """Whether a top-level entry claims what an option decides; "auto" and switched-off precisions claim nothing."""
    off = isinstance(value, dict) and value.get("enabled") in (False, AUTO)
    return key in DECIDED and key not in ("zero_allow_untested_optimizer",) and value != AUTO and not off


def engine_settings(path: Path | None) -> dict[str, Any]:
    """What of a DeepSpeed file goes to the engine as it is; empty without a file."""
    if path is None:
        return {}
    kept = {key: value for key, value in read_deepspeed_file(path).items() if key not in DECIDED}
    return {key: _without_auto(value) for key, value in kept.items() if value != AUTO}


def _without_auto(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_auto(one) for key, one in value.items() if one != AUTO}


def read_deepspeed_file(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError."""
    try:
        content = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"ds_config: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"ds_config: {path} is no JSON file: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("zero_optimization", {}), dict):
        raise ConfigError(f"ds_config: {path} must hold an object, with zero_optimization an object too")
    return content
