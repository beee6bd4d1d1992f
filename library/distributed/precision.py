"""Mixed precision of the step: the dtype by its Kohya name, and loss scaling where fp16 needs it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

DTYPES: dict[str, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# A scaled gradient that overflows below this scale overflows by itself: lowering the scale further mends nothing.
SMALLEST_SCALE = 2.0**-10


def is_lost(loss: float, grad_norm: float, scaler: Mapping[str, float]) -> bool:
    """Whether numbers are not finite for good; `scaler` is a `Stepper.state`.

    Under fp16 a gradient may overflow: the stepper skips that update and halves its scale, which usually mends it.
    """
    if not math.isfinite(loss):
        return True
    return not math.isfinite(grad_norm) and scaler.get("scale", 0.0) < SMALLEST_SCALE


class _AnyGradScaler(torch.amp.GradScaler):
    """torch's scaler for fp16 gradients as well, which full_fp16 has; its check for overflow holds for them.

    torch refuses them because what is tiny is lost when they are divided in fp16.
    """

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        del allow_fp16
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, True)


class LossScaler:
    """fp16 gradients underflow unscaled: torch's GradScaler there, a pass-through for fp32 and bf16."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype) -> None:
        self._scaler = _AnyGradScaler(device.type, enabled=dtype is torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate the scaled loss."""
        torch.autograd.backward(self.scaled(loss))

    @property
    def leaves_to_device(self) -> bool:
        """Not with fp16, whose scale follows the overflows that the host sees."""
        return not self._scaler.is_enabled()

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the present scale."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def clip(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Unscale, then clip to `max_norm` (0: only measure). Returns the norm before clipping, []."""
        self._scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))

    def step(self, optimizer: Optimizer) -> bool:
        """Step and clear gradients; False when scaled gradients overflowed and the update was skipped."""
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return self._scaler.get_scale() >= before

    def state(self) -> dict[str, float]:
        """What a resume needs; empty when scaling is off."""
        return dict(self._scaler.state_dict())

    def load_state(self, state: dict[str, float]) -> None:
        """Take up a saved state."""
        if state:
            self._scaler.load_state_dict(state)


@dataclass(slots=True)
class DynamicScale:
    """The numbers of torch's GradScaler, for a backend that scales and unscales itself; same rules, same state."""

    scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    growth_tracker: int = 0

    def update(self, stepped: bool) -> None:
        """Shrink after an overflow, grow after `growth_interval` steps without one."""
        self.growth_tracker = self.growth_tracker + 1 if stepped else 0
        if not stepped:
            self.scale *= self.backoff_factor
        elif self.growth_tracker == self.growth_interval:
            self.scale, self.growth_tracker = self.scale * self.growth_factor, 0

    def state(self) -> dict[str, float]:
        """As GradScaler's state_dict."""
        return {
            "scale": self.scale,
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": self.growth_tracker,
        }

    def load_state(self, state: dict[str, float]) -> None:
        """Take up a saved state, GradScaler's or ours."""
        self.scale, self.growth_tracker = float(state["scale"]), int(state["_growth_tracker"])
