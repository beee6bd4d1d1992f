"""Before anything is loaded on several ranks: what they send one another, whether they are alike, what they need.

Wrong numbers, other options and other code on one rank end the run: it would train something nobody asked for. What
a machine lacks for so many ranks is said, as far as it can be known, and the run goes on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import library
from library.config.options import SECRETS
from library.config.train_config import OPTIONS, TrainConfig
from library.distributed.base import World
from library.distributed.precision import DTYPES
from library.distributed.probe import gather, is_wanted, probe, unreachable
from library.errors import EnvironmentUnsupported
from library.models.block_swap import SwapPlan
from library.models.params import FluxParams, T5Params
from library.preflight.facts import DiskFacts
from library.preflight.words import count_text, size_text
from library.train.prepare import Data, ModelFiles

logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # where workers and NCCL put what processes of a machine share
NCCL_BYTES = 40e6  # of shared memory, for each rank of a machine
PREFETCH = 2  # batches that each worker has ready, torch's default
CONTROL_GROUP = Path("/sys/fs/cgroup")
T5_TOKENS = 512  # of a caption, at most
LITTLE_SPEED = 1e9  # bytes a second; below, ZeRO-3 waits most of the time
LOCAL_OPTIONS = frozenset({"local_rank"})  # what ranks may differ in, beside paths


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFacts:
    """What one rank says of itself."""

    rank: int
    host: str
    torch: str
    code: str  # hash of our own source
    options: Mapping[str, str]
    memory: int | None  # bytes of main memory that may still be taken
    shared: int | None  # bytes free in /dev/shm
    unreachable: tuple[int, ...]  # GPUs of the machine that this one's cannot read directly


@dataclass(frozen=True, slots=True)
class Checked:
    """What the check of the ranks found, all of it usable."""

    world: World
    facts: tuple[RankFacts, ...]
    speed: float | None  # bytes a second of a large sum over ranks; None with one rank
    seconds: float


def check_ranks(config: TrainConfig, world: World) -> Checked | None:
    """Check what ranks send one another and that they are alike; None where it is not asked for.

    Called by all ranks. Raises EnvironmentUnsupported.
    """
    if not is_wanted(config.distributed, world):
        return None
    began = time.monotonic()
    speed = probe(world) if world.size > 1 else None
    own = facts_of_rank(config, world)
    facts = tuple(gather(world, own)) if world.size > 1 else (own,)
    for sentence in disagreements(facts):
        raise EnvironmentUnsupported(sentence)
    return Checked(world, facts, speed, time.monotonic() - began)


def facts_of_rank(config: TrainConfig, world: World) -> RankFacts:
    """What this rank has to say."""
    return RankFacts(
        rank=world.rank, host=platform.node(), torch=torch.__version__, code=code_hash(),
        options=common_options(config), memory=free_memory(),
        shared=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        unreachable=unreachable(world.device),
    )  # fmt: skip


def common_options(config: TrainConfig) -> dict[str, str]:
    """The options that must be the same on every rank. Paths may differ from machine to machine."""
    names = (
        name for name, option in OPTIONS.items()
        if "Path" not in option.type and name not in LOCAL_OPTIONS | SECRETS
    )  # fmt: skip
    return {**{name: repr(config.value(name)) for name in names}, "datasets": repr(config.dataset_tables)}


def code_hash() -> str:
    """A hash of the source that trains."""
    root = Path(library.__file__).parent.parent
    digest = hashlib.sha256()
    for folder in ("library", "networks"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def free_memory() -> int | None:
    """Bytes of main memory that this machine, or the container, can still give; None where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known = dict(line.split(":", 1) for line in lines)
        free = int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return min(free, container_memory() or free)


def container_memory() -> int | None:
    """Bytes that the container may still take, by its control group of version 2 or 1; None without a limit."""
    for folder, limit, used, cached in (
        (CONTROL_GROUP, "memory.max", "memory.current", "file"),
        (CONTROL_GROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
    ):
        try:
            most, now = (int((folder / name).read_text(encoding="ascii")) for name in (limit, used))
            stat = dict(row.split() for row in (folder / "memory.stat").read_text("ascii").splitlines())
        except (OSError, ValueError):
            continue
        # What was read of files counts as used, and is given back when there is need.
        return max(0, most - now + int(stat.get(cached, 0)))
    return None


def disagreements(facts: Sequence[RankFacts]) -> Iterator[str]:
    """Why these ranks cannot train together."""
    first = facts[0]
    for other in facts[1:]:
        who = f"rank {other.rank} on {other.host}"
        if other.code != first.code:
            yield (
                f"{who} runs other code than rank 0 on {first.host}: put the same version of the trainer on all "
                "machines"
            )
        if different := [name for name, value in first.options.items() if other.options.get(name) != value]:
            name = different[0]
            more = f", and {len(different) - 1} more options differ" if len(different) > 1 else ""
            yield (
                f"{who} has {name} = {other.options.get(name)} where rank 0 has {first.options[name]}{more}: start "
                "all ranks with the same config"
            )


def shortages(checked: Checked, config: TrainConfig, files: ModelFiles, data: Data) -> Iterator[str]:
    """What is likely to go wrong on these machines, a sentence each."""
    first = checked.facts[0]
    for other in checked.facts:
        if other.torch != first.torch:
            yield (
                f"rank {other.rank} on {other.host} has torch {other.torch} and rank 0 has {first.torch}: steps may "
                "differ; recommended: the same version everywhere"
            )
    hosts: dict[str, list[RankFacts]] = {}
    for one in checked.facts:
        hosts.setdefault(one.host, []).append(one)
    for host, ranks in hosts.items():
        yield from _short_of_memory(host, ranks, memory_needed(config, files, checked.world, len(ranks)))
        yield from _short_of_shared(
            host, ranks, shared_needed(config, files, data, checked.world, len(ranks))
        )
    if config.distributed.uses_deepspeed and config.distributed.zero_stage == 3 and checked.speed is not None:
        weights = transformer_bytes(config, files)
        if checked.speed < LITTLE_SPEED and weights > LITTLE_SPEED:
            yield (
                f"ZeRO-3 sends {size_text(2 * weights)} in every step, at {size_text(int(checked.speed))} a second; "
                "recommended: fp8_base under DDP, if a GPU holds the model then"
            )


def line(checked: Checked, disks: Sequence[DiskFacts]) -> str:
    """What was looked at, in one line."""
    world, first = checked.world, checked.facts[0]
    said = [f"{world.size} x {world.device.type}"]
    if checked.speed is not None:
        said.append(f"sums, broadcasts and copies arrive right, {size_text(int(checked.speed))}/s summed")
    if any(one.unreachable for one in checked.facts):
        said.append("not all GPUs read one another directly")
    if first.memory is not None:
        said.append(f"{size_text(first.memory)} of memory free")
    if first.shared is not None:
        said.append(f"{size_text(first.shared)} in {SHARED_MEMORY}")
    said += [f"{size_text(disk.free)} on the disk of {disk.folder}" for disk in disks]
    return f"{'preflight':<12} {', '.join(said)} ({checked.seconds:.1f} s)"


def transformer_bytes(config: TrainConfig, files: ModelFiles) -> int:
    """The transformer's weights as they are kept."""
    return sum(_kept(config, shape) for shape in files.parts["flux"].shapes().values())


def memory_needed(config: TrainConfig, files: ModelFiles, world: World, ranks: int) -> int:
    """Bytes of main memory that `ranks` ranks of one machine take beside what they have now, roughly.

    Model files are mapped, so that ranks share what they read of them.
    """
    part, memory = files.parts["flux"], config.memory
    whole = transformer_bytes(config, files)
    each = 0
    if memory.blocks_to_swap:
        params = part.params()
        assert isinstance(params, FluxParams)
        plan = SwapPlan.of(params, memory.blocks_to_swap)
        shapes = part.shapes().items()
        each += sum(_kept(config, shape) for name, shape in shapes if plan.covers(name, params.depth))
    stored = {part.info(name).torch_dtype for name in part.tensors}
    split = config.distributed.uses_deepspeed and config.distributed.zero_stage == 3
    if world.device.type == "cpu" or (split and stored != {DTYPES[config.training.mixed_precision]}):
        each += whole  # not as it is in the file, so nothing is shared
    elif config.model.disable_mmap_load_safetensors:
        each += sum(part.info(name).end - part.info(name).start for name in part.tensors)
    kept_here = (
        whole * ranks // world.size if split and config.distributed.offload_param_device == "cpu" else 0
    )
    return ranks * each + kept_here


def _kept(config: TrainConfig, shape: Sequence[int]) -> int:
    """Bytes of one of the transformer's tensors while training."""
    eight_bits = config.memory.fp8_base or config.memory.base_compute != "bf16"
    width = 1 if eight_bits and len(shape) > 1 else DTYPES[config.training.mixed_precision].itemsize
    return torch.Size(shape).numel() * width


def shared_needed(config: TrainConfig, files: ModelFiles, data: Data, world: World, ranks: int) -> int:
    """Bytes of /dev/shm that the data workers and NCCL of `ranks` ranks take at most, roughly."""
    caching, t5 = config.caching, files.parts["t5xxl"].params()
    assert isinstance(t5, T5Params)
    workers = min(config.dataset.max_data_loader_n_workers, os.cpu_count() or 1)
    length = config.model.t5xxl_max_token_length or T5_TOKENS
    text = length * t5.d_model * 4 if caching.cache_text_encoder_outputs else 0
    batches = []
    for dataset in data.datasets:
        width, height = dataset.resolution
        pixels = width * height
        picture = pixels if caching.cache_latents else pixels * 3 * 4  # latents: 16 float32 for 64 pixels
        batches.append(dataset.batch_size * (picture + text))
    nccl = NCCL_BYTES if world.device.type == "cuda" and ranks > 1 else 0
    return ranks * int(workers * PREFETCH * max(batches, default=0) + nccl)


def _short_of_memory(host: str, ranks: Sequence[RankFacts], needed: int) -> Iterator[str]:
    free = min((one.memory for one in ranks if one.memory is not None), default=None)
    if free is not None and needed > free:
        yield (
            f"{host} has {size_text(free)} of main memory free, and {count_text(len(ranks), 'rank')} may take "
            f"{size_text(needed)}; recommended: fewer blocks_to_swap, fp8_base, or fewer ranks"
        )


def _short_of_shared(host: str, ranks: Sequence[RankFacts], needed: int) -> Iterator[str]:
    free = min((one.shared for one in ranks if one.shared is not None), default=None)
    if free is not None and needed > free:
        yield (
            f"{SHARED_MEMORY} of {host} has {size_text(free)} free, and the data workers of "
            f"{count_text(len(ranks), 'rank')} put up to {size_text(needed)} there; recommended: start the container "
            "with --ipc=host or a larger --shm-size, or lower max_data_loader_n_workers (0 needs none)"
        )
