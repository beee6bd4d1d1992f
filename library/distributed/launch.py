"""From how the process was started to a backend: plain python, `accelerate launch` or `torchrun`."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from library.distributed.base import Backend, World
from library.distributed.ddp import DdpBackend, DdpSettings
from library.distributed.single import SingleBackend

DEFAULT_TIMEOUT = timedelta(minutes=30)  # a collective waits at most this long for the slowest rank's step


def launched_rank() -> int:
    """This process's rank as its launcher told it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """How many ranks the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(local_rank: int) -> torch.device:
    """The GPU of this rank, Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def connect(*, dtype: torch.dtype, settings: DdpSettings, timeout_minutes: int | None) -> Backend:
    """Join the ranks this process was started with. `timeout_minutes` is Kohya's ddp_timeout."""
    size, local_rank = launched_world_size(), int(os.environ.get("LOCAL_RANK", "0"))
    device = choose_device(local_rank)
    world = World(rank=launched_rank(), size=size, local_rank=local_rank, device=device)
    if size == 1:
        return SingleBackend(world, dtype=dtype)
    timeout = timedelta(minutes=timeout_minutes) if timeout_minutes else DEFAULT_TIMEOUT
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", store), rank=rank, world_size=size, timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    return DdpBackend(world, store=PrefixStore("wait", store), dtype=dtype, settings=settings)
