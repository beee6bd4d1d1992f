"""What the trainer needs of a set of ranks, as a narrow Protocol; who this process is, as a value.

The trainer never asks which backend it has. A backend owns how the root module is wrapped, how gradients are
averaged, scaled and clipped, where parameters and optimizer state lie, and how ranks wait for one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from library.optim.state import ExportedState


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0


class Stepper(Protocol):
    """How gradients become an update: unscaling, clipping, the step itself."""

    @property
    def leaves_to_device(self) -> bool:
        """Whether `step` asks nothing of the host: it makes the optimizer's own step, which may leave itself out."""
        ...

    def clip(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Unscale and clip the L2 norm of the gradients to `max_norm` (0: only measure). Returns the norm before it."""
        ...

    def step(self, optimizer: Optimizer) -> bool:
        """Update the parameters and clear gradients. False when fp16 overflowed and the update was skipped."""
        ...

    def state(self) -> dict[str, float]:
        """State of fp16 loss scaling, for a checkpoint; empty without it."""
        ...

    def load_state(self, state: dict[str, float]) -> None:
        """Take up a saved `state`."""
        ...


class Backend(Protocol):
    """One way to run the same training on one or several ranks."""

    world: World
    stepper: Stepper
    load_device: torch.device  # where models that are not cached away are read to before `wrap`
    captures_alone: (
        bool  # a rank holds all that is trained: it can write a state that the others take no part in
    )
    in_lockstep: bool  # every rank must call the module as often as the others, when only drawing as well

    def wrap(self, module: nn.Module, optimizer: Optimizer, *, recordable: bool = False) -> nn.Module:
        """Make the root module's forward take part in gradient averaging; move it to the device. Called once.

        `recordable` asks that micro-steps can be recorded and replayed: gradients stay in their place, and ranks
        meet after the backward pass. `keeps_gradients` tells whether it is so.
        """
        ...

    @property
    def keeps_gradients(self) -> bool:
        """Whether micro-steps may be recorded."""
        ...

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surround one micro-step; gradients are averaged over ranks in the `last` one of an optimizer step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Backpropagate this rank's part of the step's loss. The parts of all ranks and micro-steps add up to it."""
        ...

    def whole(self, module: nn.Module, *, changing: bool = False) -> AbstractContextManager[Any]:
        """Inside, the parameters of `module` are plain whole tensors. Entered and left by all ranks together.

        With `changing`, what was written into them, alike on every rank, stays.
        """
        ...

    def export_optimizer(self, optimizer: Optimizer, names: Mapping[Tensor, str]) -> ExportedState:
        """All that the optimizer remembers, whole, by the `names` of its parameters. Called by all ranks."""
        ...

    def import_optimizer(
        self, optimizer: Optimizer, names: Mapping[Tensor, str], exported: ExportedState
    ) -> None:
        """Take up what `export_optimizer` of any backend and any number of ranks gave."""
        ...

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        ...

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Small picklable values only."""
        ...

    def wait(self, name: str) -> None:
        """Wait, however long, until every rank has called this with `name`; an error of one rank ends all.

        Unlike a collective it has no timeout, so ranks may do hours of unequal work before it.
        """
        ...

    def close(self, *, failure: str | None = None) -> None:
        """Leave the group; with `failure`, tell waiting ranks why."""
        ...
