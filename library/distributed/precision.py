"""Mixed precision of the step: the dtype by its Kohya name, and loss scaling where fp16 needs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

DTYPES: dict[str, torch.dtype] = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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
        torch.autograd.backward(self._scaler.scale(loss))

    def clip(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Unscale, then clip to `max_norm` (0: only measure). Returns the norm before clipping, []."""
        self._scaler.unscale_(optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf"))

    def step(self, optimizer: Optimizer) -> bool:
        """Step; False when scaled gradients overflowed and the update was skipped."""
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= before

    def state(self) -> dict[str, float]:
        """What a resume needs; empty when scaling is off."""
        return dict(self._scaler.state_dict())

    def load_state(self, state: dict[str, float]) -> None:
        """Take up a saved state."""
        if state:
            self._scaler.load_state_dict(state)
