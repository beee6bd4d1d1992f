"""One process on one device: nothing to average, nobody to wait for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from library.distributed.base import Stepper, World
from library.distributed.precision import LossScaler


class SingleBackend:
    """The `Backend` of one process, on CPU or GPU."""

    def __init__(self, world: World, *, dtype: torch.dtype) -> None:
        self.world = world
        self._scaler = LossScaler(device=world.device, dtype=dtype)
        self.stepper: Stepper = self._scaler

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        del last
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._scaler.backward(loss)

    def sum(self, values: Tensor) -> Tensor:
        return values

    def agree(self, value: Any) -> Any:
        return value

    def wait(self, name: str) -> None:
        del name

    def close(self, *, failure: str | None = None) -> None:
        del failure
