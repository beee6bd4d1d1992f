"""Several ranks that each hold the whole model: torch's DistributedDataParallel around the root module.

DDP divides summed gradients by the number of ranks, while a step's loss here is a sum over ranks of parts that
already carry their shares of the step; `backward` multiplies by the number of ranks to undo that division.
The frozen base is not broadcast at start: every rank read it from the same files. What is trained is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from library.distributed.base import Stepper, World
from library.distributed.group import Group
from library.distributed.precision import LossScaler
from library.optim.state import ExportedState, export_state, import_state


@dataclass(frozen=True, slots=True)
class DdpSettings:
    """Kohya's ddp_* options, and whether a network may leave parameters out of a step (module dropout)."""

    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    find_unused_parameters: bool = False


class DdpBackend:
    """The `Backend` of several ranks under DDP, on NCCL or gloo."""

    in_lockstep = False

    def __init__(self, group: Group, *, dtype: torch.dtype, settings: DdpSettings) -> None:
        world = group.world
        self.world: World = world
        self.load_device = world.device
        self._group = group
        self._scaler = LossScaler(device=world.device, dtype=dtype)
        self.stepper: Stepper = self._scaler
        self._settings = settings
        self._module: DistributedDataParallel | None = None

    def wrap(self, module: nn.Module, optimizer: Optimizer) -> nn.Module:
        del optimizer
        for parameter in module.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)
        # What is frozen is no business of DDP's, which would want all of it on one device: blocks may wait
        # in main memory.
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            module, frozen
        )
        self._module = DistributedDataParallel(
            module,
            device_ids=[self.world.device] if self.world.device.type == "cuda" else None,
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=self._settings.gradient_as_bucket_view,
            static_graph=self._settings.static_graph,
            find_unused_parameters=self._settings.find_unused_parameters,
        )
        return self._module

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        assert self._module is not None, "wrap() comes first"
        # A static graph fails if its first backward pass does not average. To average in every one is as right: what
        # was averaged before is the same on all ranks.
        averages = last or self._settings.static_graph
        return nullcontext() if averages else self._module.no_sync()

    def backward(self, loss: Tensor) -> None:
        self._scaler.backward(loss * self.world.size)

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
        return self._group.sum(values)

    def agree(self, value: Any) -> Any:
        return self._group.agree(value)

    def wait(self, name: str) -> None:
        self._group.wait(name)

    def close(self, *, failure: str | None = None) -> None:
        self._group.close(failure=failure)
