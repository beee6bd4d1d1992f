"""Seconds and memory of a training step at the size of FLUX.1-dev, with random weights made on the spot.

    python -m tools.bench_train --json speed.json
    python -m tools.bench_train --resolutions 1024x1024 --train_batch_size 4 --fp8_base --gradient_checkpointing
    torchrun --nproc_per_node 4 -m tools.bench_train
    python -m tools.bench_train --resolutions 1024x1024,832x1216,1216x832,768x1344,1344x768 --against speed.json

What runs is the trainer itself (network, optimizer, loop, backend, data loader); only the weights, the latents and the
text outputs are random, which cost the same time as real ones. Options that are not the tool's own are the trainer's.

`mfu` is the share of the card's dense bf16 rate that the step's own arithmetic takes (nothing that is recomputed
counts). With several resolutions the result has the median of each, and with --against what steps of one resolution
took in a file of earlier results, scaled by tokens where one is missing: `mixed_to_single` is the ratio of the means.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from library.config.load import load_config
from library.config.train_config import TrainConfig
from library.data.records import Batch
from library.distributed.base import Backend
from library.flow.objective import Objective
from library.log import setup_logging
from library.models.params import FluxParams
from library.train import recompute
from library.train.build import Job, Trained, build_adapter, build_trained
from library.train.checkpoint import load_run
from library.train.resume import capture, restore
from library.train.saving import About, Saver, Weights
from library.train.setup import batches, build_trainer, connected, wrap
from library.train.state import TrainState
from library.train.trainer import StepReport, Trainer
from tools.bench_data import IMAGES_PER_SIZE, SIZES, RandomLoader, random_files, synthetic_data
from tools.bench_split import splits

# Dense bf16 TFLOP/s with float32 sums, from the makers' data sheets (boards in servers, at full power)
PEAK_TERAFLOPS = {
    "H200": 989.0, "H100 80GB HBM3": 989.0, "H100 PCIe": 756.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


@dataclass
class Stopwatch:
    """A listener that keeps the seconds of every step."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)

    def on_start(self, state: TrainState) -> TrainState:
        return state

    def wants_weights(self, step: int) -> bool:
        del step
        return False

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        self.seconds.append(report.seconds)
        self.losses.append(report.loss)
        self.samples.append(report.samples)
        return state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        del epoch
        return state

    def on_end(self, state: TrainState) -> TrainState:
        return state


def flops_per_sample(params: FluxParams, tokens: int) -> float:
    """Multiply-adds times two of a forward pass and of the backward pass through a frozen base (inputs only)."""
    width, mlp = params.hidden_size, params.mlp_hidden
    double = tokens * (4 * width * width + 2 * width * mlp)
    single = tokens * (3 * width * width + width * mlp + (width + mlp) * width)
    linear = 2.0 * (params.depth * double + params.depth_single_blocks * single)
    attention = 4.0 * tokens * tokens * width * (params.depth + params.depth_single_blocks)
    return 2 * linear + 3.5 * attention


def assemble(
    config: TrainConfig,
    backend: Backend,
    params: FluxParams,
    resolutions: Sequence[tuple[int, int]],
    *,
    images: int = IMAGES_PER_SIZE,
) -> tuple[Job, Trained, Trainer]:
    """A run over synthetic data, with a `Stopwatch` as its listener; `batches(job)` are its micro-batches."""
    loader = RandomLoader(config, random_files(params), params)
    data = synthetic_data(config, loader, resolutions, world=backend.world.size, images=images)
    state = TrainState(
        step=0,
        seed=0,
        steps_per_epoch=data.plan.steps_per_epoch,
        plan_fingerprint="",
        session_id=0,
        started_at=0.0,
    )
    job = Job(
        config=config, backend=backend, console=Console(stderr=True), loader=loader, data=data, saved=None,
        state=state, prompts=(), conditions={},
    )  # fmt: skip
    trained = build_trained(job)
    adapter = build_adapter(job, trained)
    objective = Objective(config.objective)
    recompute.settle(job, trained, adapter, objective)
    trainer = build_trainer(
        job,
        trained,
        module=wrap(job, trained),
        adapter=adapter,
        objective=objective,
        listeners=(Stopwatch(),),
        should_stop=lambda: False,
    )
    return job, trained, trainer


def measure(
    config: TrainConfig, backend: Backend, params: FluxParams, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train `warmup` + `steps` steps; what they took."""
    job, trained, trainer = assemble(config, backend, params, arguments.resolutions)
    shapes: list[str] = []
    stream = watched(batches(job), shapes)
    cuda = backend.world.device.type == "cuda"
    watch = Stopwatch()
    reports = read_at_once(trainer, stream) if arguments.read_at_once else trainer.steps(stream)
    started = time.perf_counter()
    for number in range(arguments.warmup + arguments.steps):
        if number == arguments.warmup:
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            first = time.perf_counter() - started
            graphs = compiled_graphs()
        watch.on_step(trainer.state, next(reports))
    if arguments.profile:
        profile(reports, Path(arguments.profile))
    parts = splits(trainer, stream, arguments.split) if arguments.split else {}
    saved = saving(job, trained, trainer.state) if arguments.save else {}
    seconds = watch.seconds[arguments.warmup :]
    measured = shapes[:: trainer.limits.micro_steps][arguments.warmup :]  # one of a step's: they are alike
    measured = measured[: len(seconds)]  # a step more may be on its way
    samples = sum(watch.samples[arguments.warmup :])
    length = job.loader.t5_length
    flops = statistics.mean(flops_per_sample(params, tokens_of(shape, length)) for shape in measured)
    # A step's report may come when the next one is done, so that the reports of so many steps take one step less.
    medians = shape_medians(seconds, measured)
    elapsed = sum(medians[shape] for shape in measured)
    rate = flops * samples / elapsed / backend.world.size / 1e12
    peak = peak_teraflops(torch.cuda.get_device_name()) if cuda else None
    return {
        "options": arguments.given,
        "ranks": backend.world.size,
        "resolutions": ["{}x{}".format(*size) for size in arguments.resolutions],
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "trainable_parameters": sum(p.numel() for p in trainer.parameters),
        "seconds_per_step": round(statistics.median(seconds), 4),
        "seconds_min_max": [round(min(seconds), 4), round(max(seconds), 4)],
        "seconds_warmup": round(first, 2),
        "images_per_second": round(samples / elapsed, 3),
        "teraflops_per_second": round(rate, 1),
        "mfu": round(rate / peak, 4) if peak else None,
        **by_shape(seconds, measured, arguments.against, t5_length=length),
        "peak_gb_allocated": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        "peak_gb_reserved": round(torch.cuda.max_memory_reserved() / 1e9, 2) if cuda else None,
        "compiled_graphs": compiled_graphs(),
        "compiled_graphs_after_warmup": compiled_graphs() - graphs,
        **parts,
        "losses": [round(loss, 5) for loss in (watch.losses[0], watch.losses[-1])],
        **saved,
    }


def watched(stream: Iterator[Batch], shapes: list[str]) -> Iterator[Batch]:
    """The same batches; the size of each picture in pixels is appended to `shapes`."""
    for batch in stream:
        assert batch.latents is not None, "the latents are cached"
        shapes.append(f"{batch.latents.shape[3] * 8}x{batch.latents.shape[2] * 8}")
        yield batch


def tokens_of(shape: str, t5_length: int) -> int:
    """Tokens of a picture of `shape` ("WxH" in pixels) and its text."""
    width, height = (int(side) for side in shape.split("x"))
    return t5_length + (width // 16) * (height // 16)


def peak_teraflops(device: str) -> float | None:
    """What the card multiplies in bf16 at most; None for one that is not in the table."""
    return next((rate for name, rate in PEAK_TERAFLOPS.items() if name in device), None)


def shape_medians(seconds: Sequence[float], shapes: Sequence[str]) -> dict[str, float]:
    """The median step of each size of picture."""
    pairs = list(zip(shapes, seconds, strict=True))
    return {shape: statistics.median(s for one, s in pairs if one == shape) for shape in sorted(set(shapes))}


def by_shape(
    seconds: Sequence[float], shapes: Sequence[str], against: Path | None, *, t5_length: int
) -> dict[str, Any]:
    """Medians of each shape, and how the mean of a mixed step compares with those of steps of one shape."""
    if len(set(shapes)) < 2:
        return {}
    medians = shape_medians(seconds, shapes)
    found: dict[str, Any] = {
        "seconds_by_shape": {shape: round(median, 4) for shape, median in medians.items()}
    }
    single = single_bucket_seconds(against) if against is not None else {}
    if not single:
        return found

    # The nearest in tokens stands for one that was not measured.
    def expected(shape: str) -> float:
        tokens = tokens_of(shape, t5_length)
        near = min(single, key=lambda one: (one != shape, abs(tokens_of(one, t5_length) - tokens)))
        return single[near] * tokens / tokens_of(near, t5_length)

    alone = statistics.mean(expected(shape) for shape in shapes)
    mixed = statistics.mean(medians[shape] for shape in shapes)
    return {**found, "seconds_single_bucket": round(alone, 4), "mixed_to_single": round(mixed / alone, 4)}


def single_bucket_seconds(results: Path) -> dict[str, float]:
    """Median step by resolution, from earlier results of runs of one resolution; the last of each counts."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {
        line["resolutions"][0]: float(line["seconds_per_step"])
        for line in lines
        if len(line.get("resolutions", ())) == 1
    }


def saving(job: Job, trained: Trained, state: TrainState) -> dict[str, float]:
    """Seconds to write the adapter and a state, and to put that state back."""
    assert job.config.saving.output_dir is not None
    folder = Path(job.backend.agree(tempfile.mkdtemp(dir=job.config.saving.output_dir)))
    parts = trained.resumable(job.backend)
    saver = Saver(
        config=replace(job.config.saving, output_dir=folder, output_name="bench"),
        weights=Weights(trained.network, trained.optimizer.evaluating, None, judged_by_ema=False),
        about=About(metadata=lambda state, epoch: {}),
        capture=lambda now: capture(now, parts),
        backend=job.backend,
    )
    times = [time.perf_counter()]
    saver.model("bench", state, epoch=1)
    times.append(time.perf_counter())
    path = saver.state("bench", state)
    job.backend.wait("state written")
    times.append(time.perf_counter())
    restore(load_run(path), parts, step=state.step)
    times.append(time.perf_counter())
    job.backend.wait("state read")
    if job.backend.world.is_main:
        shutil.rmtree(folder)
    names = ("seconds_save_adapter", "seconds_save_state", "seconds_load_state")
    return {name: round(b - a, 2) for name, (a, b) in zip(names, pairwise(times), strict=True)}


def read_at_once(trainer: Trainer, stream: Iterator[Batch]) -> Iterator[StepReport]:
    """Steps whose numbers are read before the next one begins, whatever the optimizer allows."""
    while True:
        yield trainer.optimizer_step(stream)[0]


def compiled_graphs() -> int:
    """How many graphs torch has compiled: two for each set of shapes is what a LoRA should need."""
    counters = sys.modules.get("torch._dynamo.utils")
    return 0 if counters is None else int(counters.counters["stats"]["unique_graphs"])


def profile(reports: Iterator[StepReport], path: Path) -> None:
    """Two more steps under torch's profiler: what takes the device and the host longest goes to `path`.

    With the ending .json it is the whole course of events, for a viewer of traces.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(2):
            next(reports)
    if path.suffix == ".json":
        recorded.export_chrome_trace(str(path))
        return
    keys = ["self_cpu_time_total"]  # where the host waits is there as well
    if torch.cuda.is_available():
        keys.insert(0, "self_device_time_total")
    averages = recorded.key_averages()
    tables = (averages.table(sort_by=key, row_limit=60, max_name_column_width=110) for key in keys)
    path.write_text("\n".join(tables), encoding="utf-8")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, TrainConfig]:
    """The tool's own options, and the trainer's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="dev", help="size of the transformer")
    parser.add_argument(
        "--resolutions", nargs="+", default=["1024x1024"], metavar="WxH", help="one bucket each"
    )
    parser.add_argument("--steps", type=int, default=12, help="measured steps")
    parser.add_argument("--warmup", type=int, default=4, help="steps before")
    parser.add_argument("--json", metavar="FILE", help="append the result as one line of JSON")
    parser.add_argument("--save", action="store_true", help="time saving and loading too")
    parser.add_argument(
        "--split", type=int, default=0, metavar="STEPS", help="tell where the time of more steps goes"
    )
    parser.add_argument("--against", type=Path, metavar="FILE", help="results of runs of one resolution")
    parser.add_argument("--profile", metavar="FILE", help="profile two more steps (.json: as a trace)")
    parser.add_argument(
        "--read_at_once", action="store_true", help="read every step's loss before the next step begins"
    )
    own, rest = parser.parse_known_args(argv)
    own.given = list(argv)
    names = [name for text in own.resolutions for name in text.split(",")]
    own.resolutions = [tuple(int(side) for side in name.split("x")) for name in names]
    defaults = {
        "pretrained_model_name_or_path": "polyrank/tiny-flux", "train_data_dir": "synthetic",
        "output_dir": tempfile.gettempdir(), "network_module": "networks.lora_flux", "network_dim": "16",
        "network_alpha": "16", "learning_rate": "1e-4", "timestep_sampling": "shift", "mixed_precision": "bf16",
        "discrete_flow_shift": "3.1582", "model_prediction_type": "raw", "guidance_scale": "1.0",
        "max_data_loader_n_workers": "2", "optimizer_args": "fused=True",
    }  # fmt: skip
    flags = ["--cache_latents", "--cache_text_encoder_outputs", "--network_train_unet_only"]
    words = [
        word for name, value in defaults.items() if f"--{name}" not in rest for word in (f"--{name}", value)
    ]
    return own, load_config([*words, *flags, "--max_train_steps", str(10**6), *rest]).config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement; rank 0 prints it."""
    own, config = parse(sys.argv[1:] if argv is None else argv)
    with connected(config) as backend:
        setup_logging(is_main=backend.world.is_main, console=Console(stderr=True), simple=True)
        result = measure(config, backend, SIZES[own.size], own)
        if backend.world.is_main:
            print(json.dumps(result))
            if own.json:
                with Path(own.json).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
