"""What a run says of itself: the plan of a dry run, the lines before the first step, what was written at the end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from library.config.load import LoadedConfig
from library.config.show import resolved_table
from library.config.train_config import TrainConfig
from library.models.flux import Flux
from library.models.params import ClipParams, FluxParams, T5Params
from library.models.text_encoders import ClipL, T5Encoder
from library.train.build import Job, trains_text
from library.train.caching import planned_text
from library.train.loading import ModelLoader
from library.train.prepare import Data, ModelFiles
from library.train.saving import SAVE_DTYPES
from networks.interface import create

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NetworkSize:
    """What would be trained and saved."""

    trainable: int  # parameters
    saved_bytes: int  # of one network file, headers left out


def measure_network(config: TrainConfig, files: ModelFiles) -> NetworkSize:
    """Build the network over models without memory and count. No model file is read beyond its header."""
    with torch.device("meta"):
        transformer = Flux(cast(FluxParams, files.parts["flux"].params()))
        encoders: list[nn.Module] = []
        if trains_text(config):
            encoders.append(ClipL(cast(ClipParams, files.parts["clip_l"].params())))
            if not config.caching.cache_text_encoder_outputs:
                encoders.append(T5Encoder(cast(T5Params, files.parts["t5xxl"].params())))
    network = create(config.network, text_encoders=encoders, transformer=transformer)
    network.apply()
    groups = network.parameter_groups(
        learning_rate=config.optimizer.learning_rate,
        unet_lr=config.optimizer.unet_lr,
        text_encoder_lr=config.optimizer.text_encoder_lr,
    )
    dtype = SAVE_DTYPES[config.saving.save_precision] or torch.float32
    tensors = (*network.module.parameters(), *network.module.buffers())
    return NetworkSize(
        trainable=sum(parameter.numel() for group in groups for parameter in group.params),
        saved_bytes=sum(tensor.numel() for tensor in tensors) * dtype.itemsize,
    )


def show_plan(loaded: LoadedConfig, files: ModelFiles, data: Data, console: Console) -> None:
    """Print the resolved options and what the run would do."""
    config = loaded.config
    options = Table("option", "value", "from", "effect", title="Options that differ from the default")
    for row in resolved_table(loaded):
        if row.source != "default":
            options.add_row(row.name, escape(row.value), escape(row.source), row.effect)
    console.print(options)
    console.print(_subsets(data))
    console.print(_buckets(data))
    size = measure_network(config, files)
    for name, value in (*_plan_rows(data, size), *_text_rows(config, files, data)):
        console.print(f"{name:<24} {value}", highlight=False)


def show_start(job: Job) -> None:
    """Say what is about to run, in Kohya's order."""
    data, world, plan = job.data, job.backend.world, job.data.plan
    logger.info(
        "training %d images (x repeats: %d), %d for validation; %d batches an epoch, %d epochs, %d steps; "
        "batch size %s, %d a step, on %s",
        len(data.training.records),
        sum(record.num_repeats for record in data.training.records),
        len(data.discovered.validation),
        plan.batches_per_epoch,
        plan.num_epochs,
        plan.total_steps,
        "/".join(str(dataset.batch_size) for dataset in data.datasets),
        plan.settings.units_per_step,
        f"{world.size} x {world.device.type}",
    )


def show_result(written: Sequence[Path]) -> None:
    """Say what was written and how to use it."""
    if not written:
        return
    for path in written:
        logger.info("wrote %s", path)
    network = next((path for path in reversed(written) if path.is_file()), written[-1])
    logger.info(
        "use %s: in ComfyUI put it into models/loras and add a Load LoRA node; "
        'in diffusers pipeline.load_lora_weights("%s")',
        network.name,
        network,
    )


def _plan_rows(data: Data, size: NetworkSize) -> list[tuple[str, str]]:
    plan = data.plan
    records = data.training.records
    return [
        ("images", f"{len(records)}, with repeats {sum(r.num_repeats for r in records)}"),
        ("validation images", str(len(data.discovered.validation))),
        ("regularisation images", str(sum(r.is_reg for r in records))),
        ("batches per epoch", str(plan.batches_per_epoch)),
        ("batches per step", f"{plan.settings.units_per_step} (GPUs x accumulation)"),
        ("steps per epoch", str(plan.steps_per_epoch)),
        ("epochs", str(plan.num_epochs)),
        ("total steps", str(plan.total_steps)),
        ("trainable parameters", f"{size.trainable:,}"),
        ("size of the saved file", f"{size.saved_bytes / 1e6:.1f} MB"),
    ]


def _text_rows(config: TrainConfig, files: ModelFiles, data: Data) -> list[tuple[str, str]]:
    """How many captions the run caches, and how large they are, whether they are there already or not."""
    if not config.caching.cache_text_encoder_outputs:
        return []
    needs, _ = planned_text(config, data)
    size = ModelLoader(config, files).text_size()
    on_disk = config.caching.cache_text_encoder_outputs_to_disk
    megabytes = (size.on_disk(needs) if on_disk else size.in_memory(needs)) / 1e6
    place = "on disk" if on_disk else "in memory"
    return [("text encoder outputs", f"{sum(len(n.captions) for n in needs)}, {megabytes:.1f} MB {place}")]


def _subsets(data: Data) -> Table:
    table = Table("dataset", "folder", "repeats", "images", "validation", "kind", title="Folders")
    for report in data.discovered.subsets:
        table.add_row(
            str(report.dataset + 1), escape(report.name), str(report.num_repeats), str(report.num_images),
            str(report.num_validation), "regularisation" if report.is_reg else "training",
        )  # fmt: skip
    return table


def _buckets(data: Data) -> Table:
    table = Table("dataset", "bucket", "images", "with repeats", "batches", title="Buckets of an epoch")
    for row in data.plan.report():
        table.add_row(
            str(row.dataset + 1), f"{row.bucket[0]}x{row.bucket[1]}", str(row.images), str(row.samples),
            str(row.batches),
        )  # fmt: skip
    return table
