"""Options that set another one: done once while loading, so that readers look at one option only."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.notices import Notices
from library.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Implication:
    """`option`, when it is on, sets `target` to `value`, or to its own value when that is None.

    Where the target has another value, the two contradict each other, unless there is an order: one that
    `overrides` wins over it, as in Kohya, and one that `yields` is ignored. `remark` says why it sets the target.
    """

    option: str
    target: str
    value: object = None
    overrides: bool = False
    yields: bool = False
    remark: str = ""


IMPLICATIONS = (
    Implication("cache_latents_to_disk", "cache_latents", True, overrides=True),
    Implication("cache_text_encoder_outputs_to_disk", "cache_text_encoder_outputs", True, overrides=True),
    Implication("fp8_base_unet", "fp8_base", True, overrides=True),
    Implication("cpu_offload_checkpointing", "gradient_checkpointing", True, overrides=True),
    Implication("split_mode", "blocks_to_swap", 18, yields=True),
    Implication("ds_config", "deepspeed", True, overrides=True),
    Implication("caption_extention", "caption_extension", overrides=True),
    Implication("dry_run_json", "dry_run", True, overrides=True),
    Implication("use_8bit_adam", "optimizer_type", "AdamW8bit"),
    Implication("use_lion_optimizer", "optimizer_type", "Lion"),
    # GUIs hand the backend to accelerate launch, which compiles then.
    Implication(
        "dynamo_backend", "torch_compile", True, yields=True,
        remark="turns torch_compile on, unlike in Kohya's trainer; set torch_compile to false if that is not meant",
    ),
    Implication("torch_compile", "compile_blocks", "on", overrides=True),
)  # fmt: skip


def apply_implications(values: dict[str, object], sources: dict[str, str], notices: Notices) -> None:
    """Set the implied options in `values` and say so in `sources`. Raises ConfigError for a contradiction."""
    for rule in IMPLICATIONS:
        if not values.get(rule.option):
            continue
        wanted = values[rule.option] if rule.value is None else rule.value
        present = values.get(rule.target, "")
        if str(present).lower() == str(wanted).lower():
            continue
        if rule.target in values and present != "":
            place = f"{rule.target} = {present!r} ({sources[rule.target]})"
            if rule.yields:
                notices.remarks.append(f"{rule.option} ({sources[rule.option]}) is ignored: {place} is given")
                continue
            if not rule.overrides:
                raise ConfigError(
                    f"{rule.option} ({sources[rule.option]}) means {wanted}, which contradicts {place}"
                )
            notices.remarks.append(f"{rule.option} ({sources[rule.option]}) overrides {place}")
        if rule.yields and not rule.remark:
            notices.remarks.append(
                f"{rule.option} ({sources[rule.option]}), an old form, is taken as {rule.target} = {wanted}"
            )
        if rule.remark:
            notices.remarks.append(f"{rule.option} ({sources[rule.option]}) {rule.remark}")
        values[rule.target] = wanted
        sources[rule.target] = f"implied by {rule.option}"
