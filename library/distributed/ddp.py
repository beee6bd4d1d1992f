"""Several ranks that each hold the whole model: torch's DistributedDataParallel around the root module.

DDP divides summed gradients by the number of ranks, while a step's loss here is a sum over ranks of parts that
already carry their shares of the step; `backward` multiplies by the number of ranks to undo that division.

Where micro-steps are recorded and ranks are connected well, DDP stays out of it: what hooks into the backward pass
cannot be replayed, and adding up an adapter's gradients after it costs a millisecond or two.

The frozen base is not broadcast at start: every rank read it from the same files. What is trained is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from library.distributed.base import Stepper, World
from library.distributed.gradients import KeptGradients
from library.distributed.group import Group
from library.distributed.precision import LossScaler
from library.optim.state import ExportedState, export_state, import_state

SOON = 0.01  # seconds that ranks may take to add up gradients in which no GPU computes; DDP does it meanwhile


@dataclass(frozen=True, slots=True)
class DdpSettings:
    """Kohya's ddp_* options, and whether a network may leave parameters out of a step (module dropout)."""

    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    find_unused_parameters: bool = False

    @property
    def may_sum_afterwards(self) -> bool:
        """Whether nothing asks for DDP itself."""
        return not (self.gradient_as_bucket_view or self.static_graph or self.find_unused_parameters)


class DdpBackend:
    """The `Backend` of several ranks under DDP, on NCCL or gloo."""

    captures_alone = True
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
        self._kept: KeptGradients | None = None

    def wrap(self, module: nn.Module, optimizer: Optimizer, *, recordable: bool = False) -> nn.Module:
        del optimizer
        for parameter in module.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)
        if recordable and self._settings.may_sum_afterwards:
            kept = KeptGradients(module.parameters())
            if self._group.agree(kept.seconds_to_sum()) <= SOON:
                self._kept = kept
                return module
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

    @property
    def keeps_gradients(self) -> bool:
        return self._kept is not None

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        if self._kept is not None:
            return self._summed_in(self._kept) if last else self._added_to(self._kept)
        assert self._module is not None, "wrap() comes first"
        # A static graph fails if its first backward pass does not average. To average in every one is as right: what
        # was averaged before is the same on all ranks.
        averages = last or self._settings.static_graph
        return nullcontext() if averages else self._module.no_sync()

    @contextmanager
    def _added_to(self, kept: KeptGradients) -> Iterator[None]:
        kept.attach()
        yield

    @contextmanager
    def _summed_in(self, kept: KeptGradients) -> Iterator[None]:
        kept.attach()
        yield
        kept.sum_over_ranks()

    def backward(self, loss: Tensor) -> None:
        self._scaler.backward(loss if self._kept is not None else loss * self.world.size)

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
