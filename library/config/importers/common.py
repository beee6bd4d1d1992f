"""What several sources share: numbers in names, prompt lines, buckets, the trigger word."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.config.kinds import to_float
from library.errors import ConfigError

if TYPE_CHECKING:
    from library.config.importers.rules import Draft

# What the other programs train FLUX with, whatever Kohya's defaults are.
FLUX_TARGET = {
    "model_prediction_type": "raw",
    "guidance_scale": 1.0,
    "network_train_unet_only": True,
    "caption_extension": ".txt",
}
PRECISIONS = {
    **dict.fromkeys(("float16", "fp16", "half"), "fp16"),
    **dict.fromkeys(("bfloat16", "bf16"), "bf16"),
    **dict.fromkeys(("float32", "fp32", "float"), "float"),
}
# Names of optimizers in lower case, without "-" and "_" -> ours. What is missing is passed on as it is.
OPTIMIZERS = {
    "adam8bit": "AdamW8bit",
    "adamw8bit": "AdamW8bit",
    "bnbadamw8bit": "AdamW8bit",
    "aoadamw8bit": "AdamW8bit",
    "adam": "AdamW",
    "adamw": "AdamW",
    "adamwbf16": "AdamW",
    "optimiadamw": "AdamW",
    "lion": "Lion",
    "optimilion": "Lion",
    "lion8bit": "Lion8bit",
    "bnblion8bit": "Lion8bit",
    "prodigy": "Prodigy",
    "prodigy8bit": "Prodigy",
    "adafactor": "Adafactor",
    "adamwschedulefree": "AdamWScheduleFree",
    "adagrad": "Adagrad",
    "bnbademamix8bit": "AdEMAMix8bit",
}
# Adam without W has no decoupled decay; 8-bit Prodigy does not exist as a package.
INEXACT_OPTIMIZERS = {
    "adam8bit": "AdamW8bit is Adam with decoupled weight decay",
    "adam": "AdamW is Adam with decoupled weight decay",
    "adamwbf16": "the adapter and its moments are kept in float32, which needs no stochastic rounding",
    "prodigy8bit": "Prodigy, with moments in float32",
}


def truth(value: object) -> bool:
    """A switch, also written as a word."""
    return str(value).strip().lower() in ("true", "1", "yes", "on")


def number(value: object, key: str) -> float:
    """A finite number, also written as text. Raises ConfigError naming the key."""
    try:
        return to_float(str(value))
    except ValueError as error:
        raise ConfigError(f"{key} = {value!r} {error}") from None


def text_lines(value: object) -> list[str]:
    """Prompts: a list of them, or lines; each without line breaks."""
    lines = value if isinstance(value, Sequence) and not isinstance(value, str) else str(value).splitlines()
    return [" ".join(str(line).split()) for line in lines if str(line).strip()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """How a sample picture is drawn, as flags of a prompt line."""

    width: int = 1024
    height: int = 1024
    steps: int = 20
    guidance: float = 3.5
    seed: int | None = None
    walk_seed: bool = False  # the n-th picture adds n to the seed
    negative: str = ""


def prompt_lines(prompts: Sequence[str], picture: Picture, trigger: str = "") -> str:
    """The prompts as lines with Kohya's flags; [trigger] is the trigger word."""
    lines = []
    for index, prompt in enumerate(prompts):
        flags = f"--w {picture.width} --h {picture.height} --s {picture.steps} --g {picture.guidance:g}"
        if picture.seed is not None:
            flags += f" --d {picture.seed + (index if picture.walk_seed else 0)}"
        # Kohya looks for flags after " --" only; a prompt that has such text would be cut there.
        lines.append(f"{prompt.replace('[trigger]', trigger).replace(' --', ' -')} {flags}")
    return "\n".join(lines)


def set_optimizer(draft: Draft, key: str, value: object) -> None:
    """The optimizer by its name there; one unknown there and here is refused at loading with the known ones."""
    plain = re.sub(r"[-_]", "", str(value).lower())
    name = OPTIMIZERS.get(plain, str(value))
    draft.set("optimizer_type", name, key=key, note=INEXACT_OPTIMIZERS.get(plain, ""))


def set_average(draft: Draft, given: Mapping[str, Any], prefix: str, *, decay: float) -> None:
    """The average of weights, if it is on; `decay` is the other program's without being told."""
    switch, key = f"{prefix}use_ema", f"{prefix}ema_decay"
    if not truth(given.get(switch, False)):
        return
    draft.set(
        "ema_for_samples", True, key=switch, note="the average is saved beside the last weights, as -ema"
    )
    chosen = switch if given.get(key) in (None, "") else key
    draft.set("ema_decay", given[key] if chosen == key else decay, key=chosen)


def buckets(resolution: int, *, step: int = 64, by_aspect: bool = True) -> dict[str, object]:
    """Size and buckets of a dataset whose pictures have the area of a square of `resolution` pixels."""
    if not by_aspect:
        return {"resolution": resolution, "enable_bucket": False}
    step = step if resolution >= 4 * step else 16
    low = max(step, resolution // 4 // step * step)
    return {
        "resolution": resolution,
        "enable_bucket": True,
        "min_bucket_reso": low,
        "max_bucket_reso": 2 * resolution,
        "bucket_reso_steps": step,
    }


def resolutions(value: object, key: str) -> list[int]:
    """One size or several, as a number, a list, or text such as "512,768,1024". In pixels."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return [int(number(part, key)) for part in parts]


def add_dataset(draft: Draft, values: Mapping[str, object], subset: Mapping[str, Any]) -> None:
    """One more [[datasets]] with one subset. Regularisation pictures join the first one of their size."""
    same_size = [table for table in draft.tables if table["resolution"] == values["resolution"]]
    if subset.get("is_reg") and same_size:
        same_size[0]["subsets"].append(dict(subset))
    else:
        draft.tables.append({**values, "subsets": [dict(subset)]})


def keep_last(saves: object, interval: object, key: str) -> int:
    """save_last_n_steps that leaves `saves` files of every `interval` steps."""
    return max(1, (int(number(saves, key)) - 1) * int(number(interval, key)))
