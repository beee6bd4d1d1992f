"""DeepSpeed's engine around the root module: ZeRO stages 0 to 3.

Three things are arranged so that a step is the same as under the other backends. The engine's own precision modes
stay off: they would cast the whole module, frozen and 8-bit weights included, while here autocast and the dtypes of
the weights decide. Its averaging over ranks is undone as in DDP, and its scaling by accumulated micro-steps is not
used. And it steps only when the trainer says so: the gradient norm is known, and checked, before the update.

At stage 3 every weight is split on its way to the GPU; what is trained stays whole beside its part, as adapters are
small. A forward is then a matter of all ranks, also when drawing or validating.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters, Init
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from torch.optim import Optimizer

from library.config.launcher import engine_settings
from library.config.sections.distributed import DistributedConfig
from library.distributed.base import Stepper, World
from library.distributed.group import Group
from library.distributed.precision import DynamicScale, LossScaler
from library.distributed.prodigy import step_on_pieces
from library.distributed.zero_state import Pieces, pieces_of
from library.errors import EnvironmentUnsupported
from library.models.layers import DoubleStreamBlock, SingleStreamBlock
from library.optim.state import ExportedState, export_state, import_groups, import_state

# Trained parameters up to this size stay whole on every rank at stage 3: a LoRA of rank 256 on FLUX's widest layer.
LARGEST_KEPT_WHOLE = 4_000_000
LARGEST_BLOCK = 350_000_000  # parameters of FLUX's double block, rounded up
ALL_IN_ONE = 10**15  # elements: no parameter group is cut into several


def prepare_deepspeed(config: DistributedConfig, world: World) -> None:
    """What must be settled before DeepSpeed sets up communication. EnvironmentUnsupported when it cannot work."""
    # Its use of torch's collectives under their old names is not for the user to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # the engine insists on it
    if config.offload_param_device == "nvme":
        _require_async_io()
    if world.device.type == "cpu":
        # On a CPU it would compile a kernel for inference at every start, or die without a compiler.
        deepspeed.ops.__compatible_ops__ = {}


def _require_async_io() -> None:
    builder = deepspeed.ops.op_builder.AsyncIOBuilder()
    if not builder.is_compatible(verbose=False) or shutil.which("ninja") is None:
        raise EnvironmentUnsupported(
            "offload_param_device nvme needs DeepSpeed's async_io, which is compiled at its first use from libaio's "
            "headers with ninja and a C++ compiler: install libaio-dev, g++ and ninja, or use cpu"
        )


class DeepSpeedBackend:
    """The `Backend` of one or several ranks under DeepSpeed, on NCCL or gloo."""

    def __init__(self, group: Group, *, dtype: torch.dtype, config: DistributedConfig) -> None:
        world = group.world
        self.world: World = world
        self.captures_alone = config.zero_stage == 0 or world.size == 1
        self.in_lockstep = config.zero_stage == 3 and world.size > 1
        # Stage 3 takes each weight from there and splits it, so no GPU ever holds the model.
        self.load_device = torch.device("cpu") if config.zero_stage == 3 else world.device
        self._group, self._config, self._dtype = group, config, dtype
        self._scaler = LossScaler(device=world.device, dtype=dtype)  # of stage 0
        self.stepper: Stepper = self._scaler
        self._engine: Any = None

    keeps_gradients = False

    def wrap(self, module: nn.Module, optimizer: Optimizer, *, recordable: bool = False) -> nn.Module:
        del recordable  # the engine hooks into the backward pass
        settings = engine_config(self._config, trained=[p for p in module.parameters() if p.requires_grad])
        if self._config.zero_stage == 3:
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.world.device)
            Init(module=module, config_dict_or_path=settings, dtype=torch.float32)
            # A block's weights come and go together: one exchange in place of one for each of its layers.
            set_z3_leaf_modules(module, [DoubleStreamBlock, SingleStreamBlock])
        log = logging.getLogger("DeepSpeed")
        log.setLevel(logging.ERROR)  # it warns of every optimizer but its own; zero_limits knows better
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        log.setLevel(logging.WARNING)
        if self._config.zero_stage > 0:
            pieces = pieces_of(self._engine.optimizer, self._config.zero_stage)
            pieces.clear_padding()
            step_on_pieces(optimizer, total=self._group.sum, device=self.world.device)
            self.stepper = ZeroStepper(self._engine, fp16=self._dtype is torch.float16)
        engine: nn.Module = self._engine
        return engine

    @contextmanager
    def accumulate(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        whole = loss * self.world.size
        if self._config.zero_stage == 0:
            whole = self._scaler.scaled(whole)
        self._engine.backward(whole, scale_wrt_gas=False)

    @contextmanager
    def whole(self, module: nn.Module, *, changing: bool = False) -> Iterator[None]:
        with self._gathered(module, changing=changing):
            yield
        if changing and self._config.zero_stage > 0:
            self._engine.optimizer.refresh_fp32_params()

    @contextmanager
    def _gathered(self, module: nn.Module, *, changing: bool) -> Iterator[None]:
        if self._config.zero_stage < 3:
            yield
            return
        try:
            with GatheredParameters(list(module.parameters()), modifier_rank=0 if changing else None):
                yield
        finally:  # also where one rank could not write a file: the others are here as well
            kept = self._engine.optimizer.persistent_parameters
            if kept:
                kept[0].all_gather(kept)

    def export_optimizer(self, optimizer: Optimizer, names: Mapping[Tensor, str]) -> ExportedState:
        if self._config.zero_stage == 0:
            return export_state(optimizer, names)
        return export_state(optimizer, names, self._pieces().gather(optimizer, total=self._group.sum))

    def import_optimizer(
        self, optimizer: Optimizer, names: Mapping[Tensor, str], exported: ExportedState
    ) -> None:
        if self._config.zero_stage == 0:
            import_state(optimizer, names, exported)
        else:
            self._pieces().scatter(optimizer, import_groups(optimizer, names, exported))

    def _pieces(self) -> Pieces:
        return pieces_of(self._engine.optimizer, self._config.zero_stage)

    def sum(self, values: Tensor) -> Tensor:
        return self._group.sum(values)

    def agree(self, value: Any) -> Any:
        return self._group.agree(value)

    def wait(self, name: str) -> None:
        self._group.wait(name)

    def close(self, *, failure: str | None = None) -> None:
        self._group.close(failure=failure)


class ZeroStepper:
    """ZeRO's own unscaling, clipping and stepping on its pieces, with fp16 loss scaling as `LossScaler` does it."""

    def __init__(self, engine: Any, *, fp16: bool) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._scale = DynamicScale() if fp16 else None
        self._tell_scale()

    @property
    def leaves_to_device(self) -> bool:
        """Never: the engine steps what it made of the optimizer."""
        return False

    def clip(self, optimizer: Optimizer, parameters: Any, max_norm: float) -> Tensor:
        """Measure; ZeRO clips while it steps. Infinite where a gradient is not finite."""
        del optimizer, parameters
        self._zero.clip_grad = max_norm
        scale: float = self._zero.loss_scale
        return scaled_norm(self._zero) / scale

    def step(self, optimizer: Optimizer) -> bool:
        del optimizer  # the engine steps it
        self._engine.step()
        stepped = bool(self._engine.was_step_applied())
        if self._scale is not None:
            self._scale.update(stepped)
            self._tell_scale()
        return stepped

    def state(self) -> dict[str, float]:
        return {} if self._scale is None else self._scale.state()

    def load_state(self, state: dict[str, float]) -> None:
        if state and self._scale is not None:
            self._scale.load_state(state)
            self._tell_scale()

    def _tell_scale(self) -> None:
        if self._scale is not None:
            self._zero.override_loss_scale(self._scale.scale)


def scaled_norm(zero: Any) -> Tensor:
    """L2 norm of all gradients as they are, still scaled, before ZeRO steps; infinite if one is not finite."""
    if hasattr(zero, "scaled_global_norm"):  # stages 1 and 2
        norms = torch.as_tensor(zero.scaled_global_norm()).reshape(1)
    else:  # stage 3, as its own step begins
        norms = torch.stack([torch.as_tensor(norm) for norm in zero._get_norm_groups()])
    # Its sign for a group that is not finite is -1.
    finite = torch.isfinite(norms).all() & (norms >= 0).all()
    return torch.where(finite, torch.linalg.vector_norm(norms.float()), float("inf"))


def engine_config(config: DistributedConfig, *, trained: Sequence[nn.Parameter]) -> dict[str, Any]:
    """What the engine is given: the options, over what the user's DeepSpeed file says."""
    given = engine_settings(config.ds_config)
    sizes = [parameter.numel() for parameter in trained]
    zero = {
        "sub_group_size": ALL_IN_ONE,
        # Its buffer is allocated whole, and by default for models, not adapters.
        "reduce_bucket_size": max(max(sizes), sum(sizes) // 4),
        "stage3_param_persistence_threshold": min(max(sizes), LARGEST_KEPT_WHOLE),
        # A double block, or a single one and the next one on its way; nothing waits for a later use.
        "stage3_max_live_parameters": LARGEST_BLOCK,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": LARGEST_BLOCK,
        **given.pop("zero_optimization", {}),
        "stage": config.zero_stage,
    }
    _place(zero, "offload_optimizer", "cpu" if config.offload_optimizer_device else None)
    _place(zero, "offload_param", config.offload_param_device, path=config.offload_param_nvme_path)
    return {
        **given,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,  # for its speed log only; batches are the plan's
        "gradient_accumulation_steps": 2,  # more than one: the trainer says which micro-step is the last
        "gradient_clipping": 0.0,  # set at each step
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the chosen optimizer steps on the CPU as it does on a GPU
    }


def _place(zero: dict[str, Any], key: str, device: str | None, *, path: Path | None = None) -> None:
    """Set where something is kept; what else the user's file says of it (pin_memory) stays."""
    given = zero.pop(key, {})
    if device is not None:
        zero[key] = {**given, "device": device}
    if device == "nvme":
        zero[key]["nvme_path"] = str(path)
