"""The options for speed, put in effect: how frozen weights are multiplied, which attention, what is compiled.

Each can be switched alone, and each has a value that means "as plain torch does". What each does and how it
is measured: docs/performance.md.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from library.config.train_config import TrainConfig
from library.distributed.precision import DTYPES
from library.errors import EnvironmentUnsupported
from library.models import attention, carrying, compilation, frozen
from library.models.flux import Flux
from library.models.precision import block_weights, is_modulation_weight

logger = logging.getLogger(__name__)

_KINDS: tuple[frozen.Scaled, ...] = ("fp8", "int8")  # what auto prefers, best first


@dataclass(frozen=True)
class Speed:
    """What the options ask for on one device."""

    config: TrainConfig
    device: torch.device

    def check(self) -> None:
        """Refuse what this device lacks before anything is cached or loaded. Raises EnvironmentUnsupported."""
        _ = self.scaled
        attention.refuse(self.config.memory.attention, device=self.device, dtype=self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.config.training.mixed_precision]

    @cached_property
    def scaled(self) -> frozen.Scaled | None:
        """The 8 bits that base_compute asks for and this device has; None for the training precision.

        Raises EnvironmentUnsupported when they are asked for by name and the device lacks them.
        """
        wanted = self.config.memory.base_compute
        if wanted == "auto" and self.device.type != "cpu":
            return next((kind for kind in _KINDS if frozen.refusal(kind, self.device) is None), None)
        asked = next((kind for kind in _KINDS if kind == wanted), None)
        refusal = None if asked is None else frozen.refusal(asked, self.device)
        if refusal is not None:
            raise EnvironmentUnsupported(
                f"base_compute = {wanted} {refusal}: use base_compute = auto or bf16"
            )
        return asked

    def scale(self, name: str, linear: nn.Linear) -> None:
        """Store one layer's weight, the parameter `name`, as `scaled` says."""
        assert self.scaled is not None, "only where there is something to do"
        if is_modulation_weight(name):  # an error there hits all tokens alike, so it does not average out
            frozen.store_grouped(linear, device=self.device)
            return
        memory = self.config.memory
        # A block's activations save more time for their bytes than the copy does, so those are kept first.
        recomputes = memory.gradient_checkpointing and memory.recompute_blocks != 0
        spare = not (recomputes or memory.blocks_to_swap)
        frozen.store_scaled(linear, self.scaled, keep_transposed=spare, device=self.device)

    def before_weights(self, *, steps: int) -> None:
        """Begin what may take as long as reading the weights: to try the kernels of attention, and the compiler."""
        _ = self._attention
        if self._compiles(steps):
            compilation.begin(self.config.memory.dynamo_backend)

    @cached_property
    def _attention(self) -> Future[attention.Verdict] | None:
        return attention.begin(
            self.config.memory.attention, device=self.device, dtype=self._dtype,
            compiled=self.config.memory.compile_blocks != "off",
        )  # fmt: skip

    def _compiles(self, steps: int) -> bool:
        wanted = self.config.memory.compile_blocks
        return wanted == "on" or (wanted == "auto" and compilation.pays(steps=steps, device=self.device))

    def before_network(self, transformer: Flux) -> None:
        """Settle attention and frozen products: base weights are merged, nothing is on the layers yet."""
        memory = self.config.memory
        attention.settle(memory.attention, self._attention, device=self.device)
        weights = block_weights(transformer)
        if self.scaled is not None:
            for name, linear in weights.items():
                if not (frozen.is_scaled(linear) or frozen.is_grouped(linear)):
                    self.scale(name, linear)
            logger.info("base_compute: the blocks multiply %s", self.scaled)
        if self._joins:
            for linear in weights.values():
                frozen.install_joining(linear)

    @property
    def _joins(self) -> bool:
        """Whether layers take the adapter's product along."""
        wanted = self.config.memory.join_adapter
        # ZeRO-3 brings weights to the module that is called, and a joined adapter's factors are not.
        brings = self.config.distributed.uses_deepspeed and self.config.distributed.zero_stage == 3
        return wanted == "on" or (wanted == "auto" and self.device.type == "cuda" and not brings)

    def after_network(self, transformer: Flux, *, steps: int, shapes: int) -> None:
        """Make room for the adapter in the layers' products, and compile if asked to or if `steps` ahead make it pay.

        The model is final now.
        """
        # DeepSpeed sends every weight to every rank, which asks for memory without gaps.
        if self._joins and transformer.swap is None and not self.config.distributed.uses_deepspeed:
            weights = block_weights(transformer).items()
            # One row a sample is not worth it.
            linears = [linear for name, linear in weights if not is_modulation_weight(name)]
            transformer.before_forward = carrying.carry(linears, dtype=self._dtype)
        if self._compiles(steps):
            transformer.enable_compilation(backend=self.config.memory.dynamo_backend, shapes=shapes)
            logger.info("the blocks are compiled in the first steps, which takes up to a minute once")
