"""[distributed] Several GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.options import Limit, option, refused

NO_DEEPSPEED = refused(
    "--deepspeed is not available in this version: remove it, the run uses DDP under accelerate launch"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedConfig:
    """Several GPUs: DDP and DeepSpeed."""

    ddp_timeout: int | None = option(
        None,
        "how long a rank waits for the others; unset is torch's own",
        limit=Limit(ge=1, unit="minutes"),
        unset=(0,),
    )
    ddp_gradient_as_bucket_view: bool = option(False, "let gradients live in DDP's communication buffers")
    ddp_static_graph: bool = option(False, "tell DDP that every step uses the same parameters")
    deepspeed: bool = option(False, "train under DeepSpeed", effect=NO_DEEPSPEED)
    zero_stage: int = option(2, "DeepSpeed ZeRO stage", choices=(0, 1, 2, 3), effect=NO_DEEPSPEED)
    offload_optimizer_device: str | None = option(
        None, "where DeepSpeed keeps the optimizer", choices=("cpu", "nvme"), effect=NO_DEEPSPEED
    )
    offload_optimizer_nvme_path: Path | None = option(None, "folder for it on NVMe", effect=NO_DEEPSPEED)
    offload_param_device: str | None = option(
        None, "where DeepSpeed keeps parameters", choices=("cpu", "nvme"), effect=NO_DEEPSPEED
    )
    offload_param_nvme_path: Path | None = option(None, "folder for them on NVMe", effect=NO_DEEPSPEED)
    zero3_init_flag: bool = option(False, "split parameters while loading, ZeRO stage 3", effect=NO_DEEPSPEED)
    zero3_save_16bit_model: bool = option(False, "save 16-bit weights, ZeRO stage 3", effect=NO_DEEPSPEED)
    fp16_master_weights_and_gradients: bool = option(
        False, "fp16 master weights, ZeRO stage 2 with CPU offload", effect=NO_DEEPSPEED
    )
