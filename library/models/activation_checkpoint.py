"""Which blocks recompute their activations in the backward pass, and where their inputs wait meanwhile.

One switch a block, never all or nothing: the first blocks of the forward pass are recomputed and the last
ones keep their activations, because those are freed first and so cost the least at the peak. Non-reentrant,
so that gradients reach trained weights inside even when no input needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")

# A conditioning vector or a table of angles is not worth a copy over the bus; a stream of 512 tokens is.
_OFFLOAD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Recomputation:
    """The choice for one transformer.

    `blocks` is how many blocks recompute, counted in forward order, None for all and for the embedders as
    well. With `offload_inputs` the inputs of those blocks are kept in host memory until the backward pass.
    """

    blocks: int | None = None
    offload_inputs: bool = False

    def covers(self, index: int) -> bool:
        """Whether block `index` (over double, then single blocks) recomputes."""
        return self.blocks is None or index < self.blocks

    def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call `function` so that its activations are recomputed in the backward pass."""
        where: AbstractContextManager[object] = saved_on_host() if self.offload_inputs else nullcontext()
        with where:
            result: Result = checkpoint(function, *arguments, use_reentrant=False)
        return result


def saved_on_host(smallest: int = _OFFLOAD_BYTES) -> saved_tensors_hooks:
    """Context in which tensors of at least `smallest` bytes that autograd saves wait in host memory."""

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if tensor.nbytes < smallest or isinstance(tensor, torch.nn.Parameter):
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
