"""What the trainer needs of a set of ranks, as a narrow Protocol; who this process is, as a value.

The trainer never asks which backend it has. A backend owns how the root module is wrapped, how gradients are
averaged, scaled and clipped, and how ranks wait for one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


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

    def clip(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Unscale and clip the L2 norm of the gradients to `max_norm` (0: only measure). Returns the norm before it."""
        ...

    def step(self, optimizer: Optimizer) -> bool:
        """Update the parameters. False when loss scaling found an overflow and skipped the update."""
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

    def wrap(self, module: nn.Module) -> nn.Module:
        """Make the root module's forward take part in gradient averaging. Called once."""
        ...

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Surround one micro-step; gradients are averaged over ranks in the `last` one of an optimizer step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Backpropagate this rank's part of the step's loss. The parts of all ranks and micro-steps add up to it."""
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
