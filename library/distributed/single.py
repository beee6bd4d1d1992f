"""One process on one device: nothing to average, nobody to wait for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.distributed.base import World
from library.distributed.precision import LossScaler


class SingleBackend:
    """The `Backend` of one process, on CPU or GPU."""

    def __init__(self, world: World, *, dtype: torch.dtype) -> None:
        self.world = world
        self._scaler = LossScaler(device=world.device, dtype=dtype)

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        del last
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._scaler.backward(loss)

    def clip_grad_norm(
        self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_norm: float
    ) -> Tensor:
        return self._scaler.clip(optimizer, parameters, max_norm)

    def step(self, optimizer: Optimizer) -> bool:
        return self._scaler.step(optimizer)

    def scaler_state(self) -> dict[str, float]:
        return self._scaler.state()

    def load_scaler_state(self, state: dict[str, float]) -> None:
        self._scaler.load_state(state)

    def sum(self, values: Tensor) -> Tensor:
        return values

    def agree(self, value: Any) -> Any:
        return value

    def wait(self, name: str) -> None:
        del name

    def close(self, *, failure: str | None = None) -> None:
        del failure
