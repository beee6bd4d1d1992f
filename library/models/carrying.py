"""Which layers of a model carry their adapter's product within their own, and the balances of those that do in fp8.

An adapter says what its factors are by a method `factors` of the object that has taken over the layer's `forward`
(networks/layers.py); where there is none, the layer's product is joined as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn

from library.models import carried, frozen


class Factors(Protocol):
    """A low-rank product's, as the adapter keeps them: `up` times alpha / rank is what goes along."""

    @property
    def down(self) -> Tensor:
        """[rank, in]."""
        ...

    @property
    def ups(self) -> Sequence[Tensor]:
        """The blocks of `up` [out, rank]."""
        ...

    @property
    def alpha(self) -> Tensor:
        """Scalar."""
        ...

    @property
    def rank(self) -> int:
        """Of the whole."""
        ...


class Carrying:
    """The balances of a model's fp8 layers; they follow the adapter's numbers."""

    def __init__(self, layers: Sequence[tuple[nn.Linear, Factors, Tensor]]) -> None:
        """Layers that `frozen.make_room` has given a balance, the factors on each, and the smallest scale of each."""
        linears, factors, scales = zip(*layers, strict=True)
        self._scales = torch.stack(scales)
        device = self._scales.device
        self._downs = [found.down for found in factors]
        self._ups = [up for found in factors for up in found.ups]
        self._alphas = [found.alpha for found in factors]
        self._ranks = torch.tensor([float(found.rank) for found in factors], device=device)
        # Which of the `ups` are whose: as many columns as the most parts, of which some stand twice.
        counts = [len(found.ups) for found in factors]
        owned = [
            [end - count + i % count for i in range(max(counts))]
            for end, count in zip(accumulate(counts), counts, strict=True)
        ]
        self._owned = torch.tensor(owned, device=device)
        sides = [(linear.in_features, linear.out_features) for linear in linears]
        self._inner = torch.tensor(sides, device=device)
        self._balances = torch.ones(len(linears), 2, device=device)
        for linear, balance in zip(linears, self._balances, strict=True):
            linear.balance = balance

    @torch.no_grad()
    def balance(self) -> None:
        """Set all balances by the factors as they are now; before a forward pass."""
        down = torch.stack(torch._foreach_norm(self._downs, torch.inf)).float()
        up = torch.stack(torch._foreach_norm(self._ups, torch.inf)).float()[self._owned].amax(dim=1)
        up = up * (torch.stack(self._alphas) / self._ranks).abs() / self._scales
        first, second = torch.stack((down, up), dim=1), torch.stack((up, down), dim=1)
        self._balances.copy_(carried.balanced(first, second, self._inner))


def carry(linears: Iterable[nn.Linear], *, dtype: torch.dtype) -> Carrying | None:
    """Make room in all layers whose adapter says its factors; what keeps the balance of those in fp8, if there are any.

    `dtype` is what the layers compute in. After the network is applied, before anything is compiled.
    """
    balanced = []
    for linear in linears:
        factors = _factors(linear)
        if factors is None or not carried.works(linear.weight.device):
            continue
        smallest_scale = frozen.make_room(linear, factors.rank, dtype)
        if smallest_scale is not None:
            balanced.append((linear, factors, smallest_scale))
    return Carrying(balanced) if balanced else None


def _factors(linear: nn.Linear) -> Factors | None:
    """What the adapter on a layer says, if there is one that says it."""
    asked = getattr(getattr(linear.forward, "__self__", None), "factors", None)
    found: Factors | None = asked() if callable(asked) else None
    return found
