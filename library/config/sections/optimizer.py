"""[optimizer] What updates the adapter's parameters."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.options import Limit, no_effect, option

RATE = Limit(ge=0, unit="per optimizer step")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Optimizer and learning rates."""

    optimizer_type: str = option("", "optimizer by name or as package.Class; unset is AdamW")
    use_8bit_adam: bool = option(False, "the same as optimizer_type AdamW8bit")
    use_lion_optimizer: bool = option(False, "the same as optimizer_type Lion")
    optimizer_args: tuple[str, ...] = option((), "further arguments of the optimizer, as key=value")
    learning_rate: float = option(2e-6, "learning rate; 1e-4 is usual for a LoRA", limit=RATE)
    unet_lr: float | None = option(None, "learning rate of the transformer's adapter", limit=RATE)
    text_encoder_lr: tuple[float, ...] | None = option(
        None, "learning rates of the adapters of CLIP-L and T5; one value is for both", limit=RATE
    )
    max_grad_norm: float = option(
        1.0, "longest gradient, by L2 norm; 0 turns clipping off", limit=Limit(ge=0)
    )
    fused_backward_pass: bool = option(
        False,
        "step within the backward pass",
        effect=no_effect("an adapter's gradients are small, so nothing is fused"),
    )
