"""`recompute_blocks = auto`: as few blocks recomputed as the GPU's memory allows, found out by a rehearsal.

Before the first step the largest batch of the plan goes forward and backward with all blocks recomputed, which
tells what a micro-step takes at most; then forward with one block more of each kind kept, which tells what a
block's activations take. The rest is arithmetic. Nothing is kept of it but the number, the same on every rank.

Left free beside a micro-step are a share of the card, what the optimizer and averages will hold, and what recorded
steps need beside them (library/train/graphs.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.adapters.base import ModelAdapter
from library.data.buckets import Size
from library.data.dataset import read_batch
from library.data.plan import MicroBatch, Plan, Sample
from library.data.records import Batch, TextCond
from library.distributed.base import Backend
from library.flow.objective import Objective
from library.models import frozen
from library.models.flux import Flux
from library.models.memory import free_memory
from library.models.precision import block_linears
from library.train import graphs
from library.train.build import Job, Trained, token_shapes

logger = logging.getLogger(__name__)

SPARE = 0.08  # of the GPU's memory: gaps between tensors, and what libraries take beside torch
# Copies of all that is trained: states of the optimizer, gradients of recorded steps, buckets of ranks, an average.
COPIES = 5
_TOO_MUCH = 1 << 60  # bytes: more than any GPU has


class Gauge(Protocol):
    """Bytes in use on a device."""

    def in_use(self) -> int:
        """Now."""
        ...

    def begin(self) -> None:
        """Forget the peak."""
        ...

    def peak(self) -> int:
        """The most since `begin`."""
        ...


@dataclass(frozen=True, slots=True)
class CudaGauge:
    """What torch has allocated on one GPU."""

    device: torch.device

    def in_use(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes of a micro-step, beyond those in use between steps."""

    all_recomputed: int  # at most in use
    kept: tuple[int, ...]  # that keeping a block's activations adds, by block

    def of(self, blocks: int) -> int:
        """At most, with the first `blocks` blocks recomputed: when they are, those that were kept are gone."""
        return self.all_recomputed + sum(self.kept[blocks:])

    def fewest(self, room: Callable[[int], bool]) -> int:
        """The fewest blocks to recompute so that there is `room`; all where nothing less fits."""
        return next((n for n in range(len(self.kept)) if room(self.of(n))), len(self.kept))


def settle(job: Job, trained: Trained, adapter: ModelAdapter, objective: Objective) -> None:
    """Choose how many blocks are recomputed, where that is left to us; before the root module is wrapped."""
    memory, backend = job.config.memory, job.backend
    if not memory.gradient_checkpointing or memory.recompute_blocks != "auto":
        return
    transformer, device = trained.root.transformer, backend.world.device
    if device.type != "cuda" or backend.load_device != device:
        logger.info(
            "recompute_blocks: all, since memory is measured on an NVIDIA GPU that holds the whole model"
        )
        return
    shapes = unit_shapes(job.data.plan, text_tokens=job.loader.t5_length)
    forward = rehearsal(job, trained, adapter, objective, shapes[0])
    free_memory()
    with torch.random.fork_rng(devices=[device]):
        choose(
            transformer, forward, trained.parameters, backend, CudaGauge(device), _room(job, trained, shapes)
        )
    free_memory()
    job.clock.mark("rehearsal")


def choose(
    transformer: Flux,
    forward: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    backend: Backend,
    gauge: Gauge,
    room: Room,
) -> None:
    """Measure, agree with the other ranks, and have as many blocks recomputed as that gives."""
    costs = measure(transformer, forward, parameters, gauge, room)
    number = len(costs.kept)
    blocks = most(backend, costs.fewest(room), limit=number)
    transformer.recompute_first(blocks if blocks < number else None)
    logger.info(
        "recompute_blocks: %d of %d (activations of a block %.1f GB, %.1f GB free)",
        blocks, number, costs.kept[-1] / 1e9, max(0, room.bytes - costs.all_recomputed) / 1e9,
    )  # fmt: skip
    linears = [linear for linear in block_linears(transformer) if frozen.is_scaled(linear)]
    copies = sum(frozen.transposed_bytes(linear) for linear in linears)
    if blocks == 0 and transformer.swap is None and room(costs.of(0) + copies):
        for linear in linears:
            frozen.keep_transposed_copy(linear)


def measure(
    transformer: Flux,
    forward: Callable[[], Tensor],
    parameters: Sequence[nn.Parameter],
    gauge: Gauge,
    room: Callable[[int], bool],
) -> Costs:
    """What a micro-step takes; `forward` is its forward pass, the loss. Leaves no gradients behind.

    Each is done once before it is measured: what is compiled or set up meanwhile does not count. What there is no
    room for is not tried: a second single block not without room for the last one, a double one not without room
    for all single ones. It is taken to need as much as the last one, and all there is.
    """
    depth, singles = len(transformer.double_blocks), len(transformer.single_blocks)
    number = depth + singles

    @cache
    def held(blocks: int) -> int:
        transformer.recompute_first(blocks)
        forward()
        before = gauge.in_use()
        loss = forward()
        bytes_held = gauge.in_use() - before
        del loss
        return bytes_held

    def adds(block: int) -> int:
        return held(block) - held(block + 1)

    peak = 0
    transformer.recompute_first(number)
    for _ in range(2):
        before = gauge.in_use()
        gauge.begin()
        forward().backward()  # type: ignore[no-untyped-call]
        peak = gauge.peak() - before
        for parameter in parameters:
            parameter.grad = None
    last = adds(number - 1)
    # Two blocks kept in a forward pass take less than one kept and one recomputed in the backward pass.
    single = adds(number - 2) if singles > 1 and room(peak + last) else last
    double = _TOO_MUCH
    # A double block holds less than two single ones, so that trying one cannot run out of memory.
    if singles == 0 or (depth > 0 and room(peak + (singles + 2) * single)):
        double = adds(depth - 1)
    transformer.recompute_first(None)
    alike = (*[double] * depth, *[single] * singles)
    return Costs(peak, (*alike[:-1], last))


class Shape(NamedTuple):
    """Size of a micro-batch; the order is by what it takes."""

    tokens: int  # of all its samples, text included
    rows: int
    dataset: int
    bucket: Size


def unit_shapes(plan: Plan, *, text_tokens: int) -> tuple[Shape, ...]:
    """The sizes of micro-batches that the plan has, the largest first; each bucket may have a short one."""
    found = set[Shape]()
    for row in plan.report():
        whole = plan.settings.batch_sizes[row.dataset]
        width, height = row.bucket
        tokens = text_tokens + (width // 16) * (height // 16)
        counts = {min(whole, row.samples), row.samples % whole} - {0}
        found |= {Shape(tokens * rows, rows, row.dataset, row.bucket) for rows in counts}
    return tuple(sorted(found, reverse=True))


def batch_of(job: Job, shape: Shape) -> Batch:
    """A batch of real data of this size, with text of full length where lengths vary."""
    images = job.data.plan.images
    records = [
        n for n, image in enumerate(images) if (image.dataset, image.bucket) == (shape.dataset, shape.bucket)
    ]
    samples = tuple(Sample(records[row % len(records)], 0) for row in range(shape.rows))
    micro = MicroBatch(0, 0, shape.dataset, shape.bucket, samples, (1.0 / shape.rows,) * shape.rows)
    batch = read_batch(job.data.training, micro)
    if batch.text is None or not job.config.model.apply_t5_attn_mask:
        return batch
    return replace(batch, text=_full_length(batch.text, job.loader.t5_length))


def _full_length(text: TextCond, length: int) -> TextCond:
    missing = length - text.t5_hidden.shape[1]
    return replace(
        text,
        t5_hidden=F.pad(text.t5_hidden, (0, 0, 0, missing)),
        t5_mask=torch.ones_like(F.pad(text.t5_mask, (0, missing))),
    )


def rehearsal(
    job: Job, trained: Trained, adapter: ModelAdapter, objective: Objective, shape: Shape
) -> Callable[[], Tensor]:
    """The forward pass of a micro-step of this size, as `Trainer` does it, on this rank alone. It gives the loss."""
    batch = batch_of(job, shape)

    def forward() -> Tensor:
        inputs = adapter.inputs(batch)
        draw = objective.draw(inputs.latents, batch.visits, seed=job.state.seed)
        prediction = trained.root(draw.x_t, draw.t, inputs.cond)
        return (objective.loss(prediction, draw, inputs.mask) * inputs.sample_weights).sum()

    return forward


@dataclass(frozen=True, slots=True)
class Room:
    """Whether a micro-step fits that takes so many bytes."""

    bytes: int
    recorded: bool  # it is recorded, and its memory is no one else's
    other: float = 0.0  # the size of micro-steps that are recorded later, as a share

    def __call__(self, taken: int) -> bool:
        return taken + (graphs.beside(taken, other=self.other) if self.recorded else 0) <= self.bytes


def _room(job: Job, trained: Trained, shapes: Sequence[Shape]) -> Room:
    """What the GPU has for a micro-step."""
    device = job.backend.world.device
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    held = COPIES * sum(parameter.nbytes for parameter in trained.parameters)
    compiled = trained.root.transformer.compiled is not None
    return Room(
        free + unused - int(SPARE * total) - held,
        recorded=graphs.wanted(job.config, device=device, compiled=compiled),
        other=share_of_others(shapes, several=token_shapes(job) > 1),
    )


def share_of_others(shapes: Sequence[Shape], *, several: bool) -> float:
    """The size of the largest micro-steps but for those of the largest size, as a share of these."""
    if several:
        return 1.0  # as `StepGraphs` wants it
    return shapes[1].tokens / shapes[0].tokens if len(shapes) > 1 else 0.0


def most(backend: Backend, number: int, *, limit: int) -> int:
    """The largest `number`, 0 to `limit`, of all ranks."""
    chosen = torch.zeros(limit + 1, device=backend.world.device)
    chosen[number] = 1
    return int(backend.sum(chosen).nonzero().max())
