"""Gradients that stay in one place, and are summed over ranks in one piece.

A recorded step writes to the addresses it was recorded with, so gradients may not be made anew for each step. Here
they are views of one buffer (one for each dtype), which is cleared instead; ranks add up the buffer at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class KeptGradients:
    """The gradients of `parameters`, each a view of a flat buffer."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in self._parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self._flat: list[Tensor] = []
        views: dict[nn.Parameter, Tensor] = {}
        for dtype, alike in by_dtype.items():
            sizes = [parameter.numel() for parameter in alike]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=alike[0].device)
            self._flat.append(flat)
            for parameter, view in zip(alike, torch.split(flat, sizes), strict=True):
                views[parameter] = view.view_as(parameter)
        self._views = [views[parameter] for parameter in self._parameters]

    def attach(self) -> None:
        """Put them in their place, cleared, unless they are there: before the first micro-step of each step."""
        if self._parameters and self._parameters[0].grad is self._views[0]:
            return
        for flat in self._flat:
            flat.zero_()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

    def sum_over_ranks(self) -> None:
        """Add up the buffers of all ranks, in place."""
        for flat in self._flat:
            dist.all_reduce(flat)

    def seconds_to_sum(self, *, times: int = 3) -> float:
        """How long `sum_over_ranks` takes, the least of a few; called by all ranks, before there are gradients."""
        taken = []
        for _ in range(times + 1):
            _wait(self._flat)
            start = time.perf_counter()
            self.sum_over_ranks()
            _wait(self._flat)
            taken.append(time.perf_counter() - start)
        return min(taken)


def _wait(tensors: Iterable[Tensor]) -> None:
    for device in {tensor.device for tensor in tensors}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
