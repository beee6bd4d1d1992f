"""From how the process was started to a backend: plain python, `accelerate launch`, `torchrun` or `deepspeed`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from library.config.ranks import launched_ranks
from library.config.sections.distributed import DistributedConfig
from library.distributed.base import Backend, World
from library.distributed.ddp import DdpBackend, DdpSettings
from library.distributed.group import Group
from library.distributed.single import SingleBackend
from library.distributed.supervise import LISTENING, count_gpus
from library.distributed.watch import Watch
from library.errors import ConfigError, EnvironmentUnsupported
from library.leaving import starter

DEFAULT_TIMEOUT = timedelta(minutes=30)  # a collective waits at most this long for the slowest rank's step


def launched_rank() -> int:
    """This process's rank as its launcher told it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """How many ranks the launcher started; 1 without a launcher."""
    return launched_ranks(os.environ) or 1


def expected_world_size(config: DistributedConfig) -> int:
    """How many ranks the run has, or would have if it were started: for a dry run, which starts none."""
    return launched_ranks(os.environ) or (1 if config.num_gpus is None else config.num_gpus or count_gpus())


def choose_device(local_rank: int) -> torch.device:
    """The GPU of this rank, Apple's GPU, or the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def this_process() -> World:
    """This process among those that the launcher started."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise EnvironmentUnsupported(
            f"{here} processes on a machine of which {torch.cuda.device_count()} GPUs may be used, and each needs one: "
            "start fewer (--num_gpus all starts as many as there are), or look at CUDA_VISIBLE_DEVICES"
        )
    return World(
        rank=launched_rank(),
        size=launched_world_size(),
        local_rank=local_rank,
        device=choose_device(local_rank),
    )


def connect(config: DistributedConfig, *, dtype: torch.dtype, leaves_out_modules: bool) -> Backend:
    """Join the ranks this process was started with, under the backend that the options name.

    `leaves_out_modules`: whether a network may leave parameters out of a step (module dropout).
    """
    world = this_process()
    return choose_backend(
        config,
        world,
        lambda: join(world, config.ddp_timeout),
        dtype=dtype,
        leaves_out_modules=leaves_out_modules,
    )


def choose_backend(
    config: DistributedConfig,
    world: World,
    group: Callable[[], Group],
    *,
    dtype: torch.dtype,
    leaves_out_modules: bool,
) -> Backend:
    """The backend that the options name; `group` makes the process group where one is needed."""
    if config.uses_deepspeed:
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said, it need not search for one and complain
        # DeepSpeed takes seconds to import: only those who train under it wait for it.
        from library.distributed.deepspeed import DeepSpeedBackend, prepare_deepspeed  # noqa: PLC0415

        prepare_deepspeed(config, world)
        return DeepSpeedBackend(group(), dtype=dtype, config=config)
    if config.distributed == "single" and world.size > 1:
        raise ConfigError(
            f"--distributed single, but the launcher started {world.size} processes: start one, or give ddp"
        )
    if world.size == 1:
        return SingleBackend(world, dtype=dtype)
    # torch would have `broadcast_buffers` say less than it does here; not for the user to mend
    warnings.filterwarnings("ignore", category=FutureWarning, message=".broadcast_buffers.")
    settings = DdpSettings(
        gradient_as_bucket_view=config.ddp_gradient_as_bucket_view,
        static_graph=config.ddp_static_graph,
        find_unused_parameters=leaves_out_modules,
    )
    return DdpBackend(group(), dtype=dtype, settings=settings)


def join(world: World, timeout_minutes: int | None) -> Group:
    """Make the process group: of this process alone, or of all that the launcher started."""
    timeout = timedelta(minutes=timeout_minutes) if timeout_minutes else DEFAULT_TIMEOUT
    store = HashStore() if world.size == 1 else _common_store(timeout)
    on_gpu = world.device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore("group", store), rank=world.rank, world_size=world.size, timeout=timeout,
        device_id=world.device if on_gpu else None,
    )  # fmt: skip
    waiting = PrefixStore("wait", store)
    return Group(world, waiting, None if world.size == 1 else _watch(world, waiting))


def _common_store(timeout: timedelta) -> Store:
    """The store of all ranks, in rank 0 or in the launcher."""
    listening = os.environ.get(LISTENING)
    if listening is None:
        store: Store = next(rendezvous("env://", timeout=timeout))[0]
        return store
    return TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), launched_world_size(),
        is_master=launched_rank() == 0, timeout=timeout,
        master_listen_fd=int(listening) if launched_rank() == 0 else None,
    )  # fmt: skip


def _watch(world: World, store: Store) -> Watch:
    """Look after the ranks of this machine, if the launcher says which they are, and after what others say."""
    store.set(f"process/{world.rank}", str(os.getpid()))
    first = world.rank - world.local_rank
    local = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "0")))
    peers = [int(store.get(f"process/{rank}")) for rank in local if rank != world.rank]
    watch = Watch(store, peers, starter() or os.getppid())
    watch.start()
    return watch
