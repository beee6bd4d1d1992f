"""What the ranks send one another, tried with known numbers before anything depends on it.

On some machines (consumer cards behind a switch, an IOMMU that is on) copies from GPU to GPU arrive as zeros or not at
all, and training goes on with them. All of it happens in a process group of its own, whose buffers are gone afterwards.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from library.config.sections.distributed import DistributedConfig
from library.distributed.base import World
from library.errors import EnvironmentUnsupported
from library.leaving import leave

NUMBERS = 1 << 16  # of each value that is checked
SPEED_BYTES = {"cuda": 1 << 28, "cpu": 1 << 22}
ROUNDS = 3
SECONDS = 60.0  # in which the first exchange must end; a healthy one takes one or two
WHAT_HELPS = {
    "cuda": "set NCCL_P2P_DISABLE=1, which sends by way of main memory, or turn the IOMMU off",
    "cpu": "name the network to use in GLOO_SOCKET_IFNAME",
}


def is_wanted(config: DistributedConfig, world: World) -> bool:
    """Whether to check the ranks: where there are several, or when asked to."""
    return config.preflight == "on" or (config.preflight == "auto" and world.size > 1)


def probe(world: World) -> float:
    """Check sums, broadcasts, gathers and what each rank sends each. Returns bytes a second of a large sum.

    Raises EnvironmentUnsupported if a number arrives wrong; if nothing arrives at all, the process ends.
    """
    helps = WHAT_HELPS[world.device.type]
    hung = EnvironmentUnsupported(
        f"the {world.size} ranks do not get through to one another: a first exchange has not ended in {SECONDS:.0f} "
        f"seconds; {helps}"
    )
    with within(SECONDS, hung):
        try:
            group = dist.new_group()
            for what, check in CHECKS:
                for other in check(world, group):
                    raise EnvironmentUnsupported(
                        f"{what} of known numbers {f'from rank {other} ' if other >= 0 else ''}came out wrong on rank "
                        f"{world.rank}, so training would be wrong as well; {helps}"
                    )
            speed = _speed(world, group)
            dist.destroy_process_group(group)
        except dist.DistError as error:
            raise EnvironmentUnsupported(
                f"the ranks cannot reach one another ({' '.join(str(error).split())[:200]}); {helps}"
            ) from error
    return speed


def gather(world: World, value: Any) -> list[Any]:
    """Each rank's value, on every rank. Small picklable values only."""
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def unreachable(device: torch.device) -> tuple[int, ...]:
    """The GPUs of this machine whose memory `device` cannot read directly."""
    if device.type != "cuda":
        return ()
    others = (other for other in range(torch.cuda.device_count()) if other != device.index)
    return tuple(other for other in others if not torch.cuda.can_device_access_peer(device, other))


@contextmanager
def within(seconds: float, error: Exception) -> Iterator[None]:
    """End the process with `error` unless what is inside ends in time: no exception reaches a collective that hangs."""
    timer = threading.Timer(seconds, lambda: os._exit(leave(error)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _pattern(world: World, sender: int) -> Tensor:
    """Numbers [NUMBERS] that only `sender` sends, whole and small enough for exact sums."""
    return torch.arange(NUMBERS, device=world.device, dtype=torch.float32).add_(31 * sender).remainder_(997)


def _sum(world: World, group: dist.ProcessGroup) -> Iterator[int]:
    values = _pattern(world, world.rank)
    dist.all_reduce(values, group=group)
    expected = torch.stack([_pattern(world, rank) for rank in range(world.size)]).sum(0)
    if not torch.equal(values, expected):
        yield -1


def _broadcast(world: World, group: dist.ProcessGroup) -> Iterator[int]:
    for sender in {0, world.size - 1}:
        values = _pattern(world, world.rank)
        dist.broadcast(values, src=sender, group=group)
        if not torch.equal(values, _pattern(world, sender)):
            yield sender


def _gather(world: World, group: dist.ProcessGroup) -> Iterator[int]:
    got = [torch.zeros(NUMBERS, device=world.device) for _ in range(world.size)]
    dist.all_gather(got, _pattern(world, world.rank), group=group)
    for sender, values in enumerate(got):
        if not torch.equal(values, _pattern(world, sender)):
            yield sender


def _pairs(world: World, group: dist.ProcessGroup) -> Iterator[int]:
    """Each rank sends to each other one: a wrong copy has a name then."""
    mine = _pattern(world, world.rank)
    for distance in range(1, world.size):
        receiver, sender = (world.rank + distance) % world.size, (world.rank - distance) % world.size
        got = torch.zeros(NUMBERS, device=world.device)
        both = [
            dist.P2POp(dist.isend, mine, receiver, group=group),
            dist.P2POp(dist.irecv, got, sender, group=group),
        ]
        for work in dist.batch_isend_irecv(both):
            work.wait()
        if not torch.equal(got, _pattern(world, sender)):
            yield sender


Check = Callable[
    [World, dist.ProcessGroup], Iterator[int]
]  # gives the senders whose numbers arrive wrong, -1: of all
CHECKS: tuple[tuple[str, Check], ...] = (
    ("a copy", _pairs), ("a broadcast", _broadcast), ("a gather", _gather), ("a sum over ranks", _sum),
)  # fmt: skip


def _speed(world: World, group: dist.ProcessGroup) -> float:
    """Bytes a second at which a large tensor is summed over the ranks."""
    values = torch.zeros(SPEED_BYTES[world.device.type] // 4, device=world.device)
    dist.all_reduce(values, group=group)
    float(values[0])  # wait for the device
    began = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(values, group=group)
    float(values[0])
    return ROUNDS * values.nbytes / (time.perf_counter() - began)
