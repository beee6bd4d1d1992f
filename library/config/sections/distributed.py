"""[distributed] Several GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.kinds import GpuCount
from library.config.options import Limit, no_effect, option


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedConfig:
    """Several GPUs: DDP and DeepSpeed. distributed.md says which to choose and what goes with what."""

    distributed: str = option(
        "auto",
        "what ranks train under; auto: DeepSpeed if `deepspeed` or accelerate's settings ask for it, else DDP, "
        "and neither for a single process",
        choices=("auto", "single", "ddp", "deepspeed"),
        ours=True,
    )
    num_gpus: GpuCount | None = option(
        None,
        "how many GPUs of this machine to train on, or all (0): plain python then starts a process for each, on "
        "the CPU where there is no GPU; a launcher is not needed",
        limit=Limit(ge=0),
        ours=True,
    )
    preflight: str = option(
        "auto",
        "check before anything is loaded what the ranks send one another, their versions and options, and the "
        "machine; auto: where there are several",
        choices=("auto", "on", "off"),
        ours=True,
    )
    local_rank: int | None = option(
        None,
        "this process's number on its machine, as DeepSpeed's launcher gives it",
        effect=no_effect("launchers say it in the environment as well", quiet=True),
        ours=True,
    )
    ddp_timeout: int | None = option(
        None,
        "how long a rank waits for the others; unset is torch's own",
        limit=Limit(ge=1, unit="minutes"),
        unset=(0,),
    )
    ddp_gradient_as_bucket_view: bool = option(False, "let gradients live in DDP's communication buffers")
    ddp_static_graph: bool = option(False, "tell DDP that every step uses the same parameters")
    deepspeed: bool = option(False, "train under DeepSpeed")
    ds_config: Path | None = option(
        None,
        "DeepSpeed's own JSON file: its zero_optimization sets stage and offload where no option does, its "
        "bucket sizes and the like are passed on",
        ours=True,
    )
    zero_stage: int = option(
        2,
        "what DeepSpeed splits over the ranks; 0: nothing, 1: optimizer state, 2: gradients as well, 3: the "
        "frozen weights as well",
        choices=(0, 1, 2, 3),
    )
    offload_optimizer_device: str | None = option(
        None,
        "where DeepSpeed keeps and steps the optimizer; nvme is read as cpu, as an adapter's state is small",
        choices=("cpu", "nvme"),
        unset=("none",),
    )
    offload_optimizer_nvme_path: Path | None = option(
        None, "folder for it on NVMe", effect=no_effect("an adapter's optimizer state fits in main memory")
    )
    offload_param_device: str | None = option(
        None,
        "where DeepSpeed keeps this rank's part of the weights, ZeRO stage 3",
        choices=("cpu", "nvme"),
        unset=("none",),
    )
    offload_param_nvme_path: Path | None = option(None, "folder for them on NVMe")
    zero3_init_flag: bool = option(
        False,
        "split weights while loading, ZeRO stage 3",
        effect=no_effect("stage 3 always splits each weight on its way to the GPU", quiet=True),
    )
    zero3_save_16bit_model: bool = option(
        False,
        "save 16-bit weights, ZeRO stage 3",
        effect=no_effect("only adapters are saved, whole at every stage, in save_precision"),
    )
    fp16_master_weights_and_gradients: bool = option(
        False,
        "fp16 master weights, ZeRO stage 2 with CPU offload",
        effect=no_effect("trained weights stay float32: an adapter's are small beside the model"),
    )

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the run trains under DeepSpeed."""
        return self.distributed == "deepspeed" or (self.distributed == "auto" and self.deepspeed)
