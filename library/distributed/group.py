"""The ranks of a run as a process group: what they sum, agree on and wait for, whatever trains on them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from library.distributed.base import World
from library.errors import TrainerError

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Group:
    """All ranks; the methods are those of `Backend`."""

    world: World
    store: Store

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        dist.all_reduce(values)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self, name: str) -> None:
        """Wait without a timeout until every rank is here; an error of one rank ends all."""
        self.store.add(f"arrived/{name}", 1)
        while self.store.add(f"arrived/{name}", 0) < self.world.size:
            self._follow()
            time.sleep(POLL_SECONDS)
        self.store.add(f"seen/{name}", 1)
        if self.world.is_main:
            # It may keep the store, and be about to leave.
            while self.store.add(f"seen/{name}", 0) < self.world.size:
                self._follow()
                time.sleep(POLL_SECONDS / 10)

    def close(self, *, failure: str | None = None) -> None:
        """Leave the group; with `failure`, tell waiting ranks why.

        Raises TrainerError if another rank failed before: a broken connection is only its echo.
        """
        if failure is not None:
            self._follow()
            # An abort, not a farewell: peers may sit in a collective that this rank will never join.
            self.store.set("failure", f"rank {self.world.rank}: {failure}")
            return
        self.wait("the end")  # the main rank may still be writing
        dist.destroy_process_group()

    def _follow(self) -> None:
        """Stop where another rank has said that it stopped."""
        if self.store.check(["failure"]):
            raise TrainerError(f"another rank stopped: {self.store.get('failure').decode()}")
