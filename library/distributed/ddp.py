"""Several ranks that each hold the whole model: torch's DistributedDataParallel around the root module.

DDP divides summed gradients by the number of ranks, while a step's loss here is a sum over ranks of parts that
already carry their shares of the step; `backward` multiplies by the number of ranks to undo that division.
The frozen base is not broadcast at start: every rank read it from the same files. What is trained is compared.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import Store
from torch.nn.parallel import DistributedDataParallel

from library.distributed.base import Stepper, World
from library.distributed.precision import LossScaler
from library.errors import TrainerError

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class DdpSettings:
    """Kohya's ddp_* options, and whether a network may leave parameters out of a step (module dropout)."""

    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    find_unused_parameters: bool = False


class DdpBackend:
    """The `Backend` of several ranks under DDP, on NCCL or gloo."""

    def __init__(self, world: World, *, store: Store, dtype: torch.dtype, settings: DdpSettings) -> None:
        self.world = world
        self._store = store
        self._scaler = LossScaler(device=world.device, dtype=dtype)
        self.stepper: Stepper = self._scaler
        self._settings = settings
        self._module: DistributedDataParallel | None = None

    def wrap(self, module: nn.Module) -> nn.Module:
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
        return nullcontext() if last else self._module.no_sync()

    def backward(self, loss: Tensor) -> None:
        self._scaler.backward(loss * self.world.size)

    def sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def agree(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self, name: str) -> None:
        self._store.add(f"arrived/{name}", 1)
        while self._store.add(f"arrived/{name}", 0) < self.world.size:
            if self._store.check(["failure"]):
                raise TrainerError(f"another rank stopped: {self._store.get('failure').decode()}")
            time.sleep(POLL_SECONDS)

    def close(self, *, failure: str | None = None) -> None:
        if failure is not None:
            # An abort, not a farewell: peers may sit in a collective that this rank will never join.
            self._store.set("failure", f"rank {self.world.rank}: {failure}")
            return
        self.wait("the end")  # the main rank may still be writing
        dist.destroy_process_group()
