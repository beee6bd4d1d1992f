"""[optimizer] What updates the network's parameters. Kohya's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """Learning rates are per optimizer step."""

    optimizer_type: str = ""
    use_8bit_adam: bool = False
    use_lion_optimizer: bool = False
    learning_rate: float = 2e-6
    unet_lr: float | None = None
    text_encoder_lr: tuple[float, ...] | None = None
    optimizer_args: tuple[str, ...] = ()
    max_grad_norm: float = 1.0
    fused_backward_pass: bool = False
