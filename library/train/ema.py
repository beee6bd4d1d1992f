"""A running average of what is trained: after each step a = d a + (1 - d) w, in float32.

The share d that is kept rises as min(decay, (1 + n) / (10 + n)) with the number n of steps averaged, so that the random
beginning is soon forgotten. The weights of every rank are the same, so every rank averages alike and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.distributed.base import Backend
from library.errors import CheckpointError

COUNT = "updates"  # beside the averages of parameters, whose names have a dot before the last word


class Ema:
    """The average of `module`'s trained parameters; it begins as they are when `start` or `load_state` is called.

    On a GPU nothing waits for it. With `on_cpu` the weights of a step are on their way to main memory while the next
    step is computed, and averaged there when it has been given to the device.
    """

    def __init__(self, module: nn.Module, *, backend: Backend, decay: float, on_cpu: bool) -> None:
        self._module, self._backend, self._decay = module, backend, decay
        self._on_cpu = on_cpu
        self._device = torch.device("cpu") if on_cpu else backend.world.device
        self._names = [name for name, p in module.named_parameters() if p.requires_grad]
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._average: list[Tensor] = []
        self._updates = 0
        self._coming: _Coming | None = None

    @property
    def has_begun(self) -> bool:
        """Whether there is an average yet."""
        return bool(self._average)

    @torch.no_grad()
    def start(self) -> None:
        """Begin with the weights as they are. Called by all ranks together, as is all below."""
        with self._backend.whole(self._module):
            self._average = [p.detach().to(self._device, torch.float32, copy=True) for p in self._parameters]
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights that an optimizer step left."""
        self._updates += 1
        share = self._share()
        self._settle()
        with self._backend.whole(self._module):
            weights = [parameter.detach() for parameter in self._parameters]
            if self._on_cpu:
                self._coming = _Coming(weights, share)
            else:
                torch._foreach_lerp_(self._average, [weight.float() for weight in weights], share)

    @torch.no_grad()
    def take_back(self, updates: int) -> None:
        """Undo the last `updates`, to rounding: they took in the weights as they are, for steps that were not made."""
        self._settle()
        with self._backend.whole(self._module):
            weights = [p.detach().to(self._device, torch.float32) for p in self._parameters]
        for _ in range(updates):
            share = self._share()
            self._updates -= 1
            torch._foreach_lerp_(self._average, weights, -share / (1 - share))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have the average in the network for a while, then the weights to train on, to the bit."""
        self._settle()
        with self._backend.whole(self._module):
            kept = [parameter.detach().clone() for parameter in self._parameters]
        try:
            self._put(self._average)
            yield
        finally:
            self._put(kept)  # takes no memory, which may have run out

    def state(self) -> dict[str, Tensor]:
        """What a resume needs: the averages by name of the parameter, and how many steps are in them."""
        self._settle()
        return {COUNT: torch.tensor(self._updates), **dict(zip(self._names, self._average, strict=True))}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave. CheckpointError when it is of another network."""
        different = sorted({COUNT, *self._names} ^ state.keys())
        if different:
            raise CheckpointError(
                f"--resume: the saved average differs in {len(different)} tensors, such as {different[0]}; resume "
                "with the same network_module and network_args"
            )
        self._updates = int(state[COUNT])
        self._average = [state[name].to(self._device, torch.float32, copy=True) for name in self._names]

    def _share(self) -> float:
        """What the last update's weights are of the average; in (0, 1)."""
        return 1 - min(self._decay, (1 + self._updates) / (10 + self._updates))

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        """Write `values` into the network."""
        with self._backend.whole(self._module, changing=True):
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.data.copy_(value)

    def _settle(self) -> None:
        """Take in what was on its way."""
        coming, self._coming = self._coming, None
        if coming is not None:
            torch._foreach_lerp_(self._average, coming.arrived(), coming.share)


class _Coming:
    """Weights on their way to main memory, and the share of the average that they will make."""

    def __init__(self, weights: Sequence[Tensor], share: float) -> None:
        self.share = share
        pinned = weights[0].is_cuda
        flat = torch.cat([weight.float().flatten() for weight in weights])  # one copy, not hundreds
        host = torch.empty(flat.shape, pin_memory=pinned).copy_(flat, non_blocking=pinned)
        parts = torch.split(host, [weight.numel() for weight in weights])
        self._host = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
        self._event: torch.cuda.Event | None = None
        if pinned:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def arrived(self) -> list[Tensor]:
        """The weights; waits for them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
