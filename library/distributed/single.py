"""One process on one device: nothing to average, nobody to wait for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.distributed.base import Stepper, World
from library.distributed.gradients import KeptGradients
from library.distributed.precision import LossScaler
from library.optim.state import ExportedState, export_state, import_state


class SingleBackend:
    """The `Backend` of one process, on CPU or GPU."""

    captures_alone = True
    in_lockstep = False

    def __init__(self, world: World, *, dtype: torch.dtype) -> None:
        self.world = world
        self.load_device = world.device
        self._scaler = LossScaler(device=world.device, dtype=dtype)
        self.stepper: Stepper = self._scaler
        self._kept: KeptGradients | None = None

    def wrap(self, module: nn.Module, optimizer: Optimizer, *, recordable: bool = False) -> nn.Module:
        del optimizer
        if recordable:
            self._kept = KeptGradients(module.parameters())
        return module

    @property
    def keeps_gradients(self) -> bool:
        return self._kept is not None

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        del last
        if self._kept is not None:
            self._kept.attach()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._scaler.backward(loss)

    def whole(self, module: nn.Module, *, changing: bool = False) -> AbstractContextManager[Any]:
        del module, changing
        return nullcontext()

    def export_optimizer(self, optimizer: Optimizer, names: Mapping[Tensor, str]) -> ExportedState:
        return export_state(optimizer, names)

    def import_optimizer(
        self, optimizer: Optimizer, names: Mapping[Tensor, str], exported: ExportedState
    ) -> None:
        import_state(optimizer, names, exported)

    def sum(self, values: Tensor) -> Tensor:
        return values

    def agree(self, value: Any) -> Any:
        return value

    def wait(self, name: str) -> None:
        del name

    def close(self, *, failure: str | None = None) -> None:
        del failure
