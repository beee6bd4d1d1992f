"""The ranks of a run as a process group: what they sum, agree on and wait for, whatever trains on them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from library.distributed.base import World
from library.distributed.watch import Watch
from library.errors import RankFollowed, RankLost

POLL_SECONDS = 0.2
# How gloo and NCCL say that the other end of a connection is gone
BROKEN = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exit")
KEEPER_GONE = "another rank stopped: the rank that keeps the store is gone"
HEAD_START = 0.3  # seconds in which rank 0 may be the first to say what all ranks find


@dataclass(frozen=True, slots=True)
class Group:
    """All ranks; the methods are those of `Backend`."""

    world: World
    store: Store
    watch: Watch | None = None

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
        try:
            self._meet(name)
        except dist.DistError as error:  # it may have left before its failure was read
            raise RankFollowed(KEEPER_GONE) from error

    def _meet(self, name: str) -> None:
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
        """Leave the group; with `failure`, tell the others why.

        Raises RankFollowed if another rank failed before: a broken connection is only its echo. Raises RankLost
        if a connection is all that failed.
        """
        if failure is not None:
            if not self.world.is_main:
                time.sleep(HEAD_START)
            # An abort, not a farewell: peers may sit in a collective that this rank will never join.
            mine = f"rank {self.world.rank}: {failure}"
            try:
                first = self.store.compare_set("failure", "", mine).decode()
            except dist.DistError as error:
                raise RankFollowed(KEEPER_GONE) from error
            if first != mine:
                raise RankFollowed(f"another rank stopped: {first}")
            if any(words in failure for words in BROKEN):
                raise RankLost(
                    f"another rank is gone ({' '.join(failure.split())[:160]}); what started the ranks says how it "
                    "ended, and --resume auto goes on from the last state"
                )
            return
        self.wait("the end")  # the main rank may still be writing
        if self.watch is not None:
            self.watch.stop()
        dist.destroy_process_group()

    def _follow(self) -> None:
        """Stop where another rank has said that it stopped."""
        if self.store.check(["failure"]):
            raise RankFollowed(f"another rank stopped: {self.store.get('failure').decode()}")
