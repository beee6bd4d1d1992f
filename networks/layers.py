"""A low-rank adapter on one Linear layer.

`LoRALinear` takes the place of its layer's `forward`; the layer itself, its class and its weight stay
untouched:

    y = W x + up(drop(down(x))) * multiplier * alpha / rank

Because the instance's `forward` is replaced, an adapter is applied before the model is sharded or compiled,
code that replaces `forward` later undoes it, and a model that carries adapters is not deep-copied.

A split layer (q, k, v and mlp rows of a fused projection, each with an adapter of its own) is the same
thing with a block-diagonal `up`: its rank is the parts' together and its alpha the parts' sum, which is
also how it is written to a file, so every reader gets the trained strength.

Where the layer's own `forward` takes a low-rank product along (an argument `low_rank`), it gets the factors and
returns the sum: the owner of the weight can add it for less. Whatever comes between the factors (dropouts)
or beside them (GGPO) is computed here as ever.

Dropout masks come from torch's global generators, as the recomputation of activations and torch's own
dropout need; the trainer seeds them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from networks.ggpo import Perturbation, gradient_row_norms
from networks.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropouts:
    """Probabilities in [0, 1), in training only."""

    activation: float = 0.0  # of each of the rank activations of each token
    rank: float = 0.0  # of a rank, for all tokens of a sample; the rest is scaled up
    module: float = 0.0  # of the whole adapter, once a call; the rest is not scaled


class Factors(NamedTuple):
    """The factors of one layer: `up` times multiplier * alpha / rank is what goes along."""

    down: Tensor  # [rank, in]
    ups: Sequence[Tensor]  # the blocks of `up` [out, rank]
    alpha: Tensor  # scalar float32
    rank: int
    multiplier: float


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Matrices [o_i, r_i] along the diagonal of one [sum o, sum r]."""
    joined: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return joined


def diagonal_blocks(matrix: Tensor, rows: Sequence[int]) -> list[Tensor] | None:
    """Blocks of `rows` rows and equal widths on the diagonal of `matrix`; None if there is more to it."""
    width, rest = divmod(matrix.shape[1], len(rows))
    if rest:
        return None
    bands = torch.split(matrix, list(rows))
    blocks = [band[:, i * width : (i + 1) * width] for i, band in enumerate(bands)]
    inside = sum(int(block.count_nonzero()) for block in blocks)
    return blocks if inside == int(matrix.count_nonzero()) else None


class LoRALinear(nn.Module):
    """The adapter of one target: `lora_down` [rank, in], `lora_up` [out, rank] (or its parts), `alpha`.

    `rank` is the total over the parts, `alpha` belongs to it. Initialised as Kohya does: `down` uniform after
    Kaiming with a = sqrt(5), `up` zero; numbers come from torch's global generator.
    """

    alpha: Tensor  # scalar, float32

    def __init__(self, target: Target, *, alpha: float, dropouts: Dropouts, multiplier: float) -> None:
        super().__init__()
        linear = target.candidate.linear
        self.lora_name = target.candidate.name
        self.parts = target.parts
        self.part_rank = target.rank
        self.rank = target.rank * max(1, len(target.parts))
        self.multiplier = multiplier
        self.dropouts = dropouts
        self.perturbation: Perturbation | None = None
        self.lora_down = nn.Linear(linear.in_features, self.rank, bias=False)
        self.lora_up: nn.Linear | nn.ModuleList
        if self.parts:
            self.lora_up = nn.ModuleList(nn.Linear(self.part_rank, rows, bias=False) for rows in self.parts)
        else:
            self.lora_up = nn.Linear(self.rank, linear.out_features, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5))
        for up in self.ups():
            nn.init.zeros_(up.weight)
        total = float(alpha or target.rank) * max(1, len(target.parts))
        self.register_buffer("alpha", torch.tensor(total, dtype=torch.float32))
        # In a tuple, so that the base layer is not registered as part of the adapter.
        self._linear = (linear,)
        self._base_forward: Callable[..., Tensor] | None = None
        self._base_joins = False

    @property
    def linear(self) -> nn.Linear:
        """The adapted layer."""
        return self._linear[0]

    @property
    def scale(self) -> Tensor:
        """alpha / rank, scalar. Read off the buffer each time: a file or a resumed state may have changed it."""
        return self.alpha / self.rank

    def ups(self) -> list[nn.Linear]:
        """The up projections, one a part; a single one when not split."""
        if isinstance(self.lora_up, nn.Linear):
            return [self.lora_up]
        return [up for up in self.lora_up if isinstance(up, nn.Linear)]

    def apply_to(self) -> None:
        """Take over the layer's `forward`: the instance's, as every network of this interface does."""
        assert self._base_forward is None, f"{self.lora_name} is applied already"
        self._base_forward = self.linear.forward
        self._base_joins = "low_rank" in inspect.signature(self._base_forward).parameters
        self.linear.forward = self.forward  # type: ignore[method-assign, assignment]

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        """The layer's output with the adapter, in the dtype of the layer's own output."""
        assert self._base_forward is not None, f"{self.lora_name} is not applied"
        if self.multiplier == 0 and not torch.is_grad_enabled():
            return self._base_forward(x)
        if self._base_joins and not self._between_factors():
            up = self.joined_up() if self.parts else self.ups()[0].weight
            return self._base_forward(
                x, low_rank=(self.lora_down.weight, up * (self.multiplier * self.scale))
            )
        base = self._base_forward(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_down.weight.dtype)
        hidden = self._drop(self.lora_down(x)) * (self.multiplier * self.scale)  # [..., rank]
        output = base + self._up(hidden).to(base.dtype)
        if self.training and self.perturbation is not None:
            output = output + self.perturbation(x).to(base.dtype)
        return output

    def factors(self) -> Factors | None:
        """What the layer's own product takes along in training; None where it does not."""
        if not self._base_joins or self._between_factors():
            return None
        ups = [up.weight for up in self.ups()]
        return Factors(self.lora_down.weight, ups, self.alpha, self.rank, self.multiplier)

    def _between_factors(self) -> bool:
        """Whether more than the two factors shapes the output now."""
        drop = self.dropouts
        drops = bool(drop.activation or drop.rank or drop.module)
        return self.training and (drops or self.perturbation is not None)

    def _up(self, hidden: Tensor) -> Tensor:  # [..., rank] -> [..., out]
        if isinstance(self.lora_up, nn.Linear):
            up: Tensor = self.lora_up(hidden)
            return up
        chunks = torch.split(hidden, self.part_rank, dim=-1)
        return torch.cat([up(chunk) for up, chunk in zip(self.ups(), chunks, strict=True)], dim=-1)

    def _drop(self, hidden: Tensor) -> Tensor:  # [B, ..., rank]
        if not self.training:
            return hidden
        drop = self.dropouts
        if drop.activation:
            hidden = nn.functional.dropout(hidden, p=drop.activation)
        if drop.rank:
            shape = (hidden.shape[0], *(1,) * (hidden.ndim - 2), hidden.shape[-1])
            kept = torch.rand(shape, device=hidden.device) >= drop.rank
            hidden = hidden * (kept.to(hidden.dtype) / (1 - drop.rank))
        if drop.module:
            # A factor of 0 or 1 rather than a branch: DDP waits for every parameter, the device for nobody.
            hidden = hidden * (torch.rand((), device=hidden.device) >= drop.module).to(hidden.dtype)
        return hidden

    def joined_up(self) -> Tensor:
        """`up` as one matrix [out, rank], block-diagonal when split."""
        return block_diagonal([up.weight for up in self.ups()])

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the adapter adds to the weight: [out, in] float32, with scale and multiplier."""
        product = self.joined_up().float() @ self.lora_down.weight.float()
        return product * (self.multiplier * self.scale)

    @torch.no_grad()
    def delta_norm(self) -> Tensor:
        """Frobenius norm of `scale * up @ down`, scalar float32, from rank x rank products only."""
        downs = torch.split(self.lora_down.weight.float(), self.part_rank)
        squared = torch.zeros((), device=self.lora_down.weight.device)
        for up, down in zip(self.ups(), downs, strict=True):
            weight = up.weight.float()
            squared = squared + ((weight.T @ weight) * (down @ down.T)).sum()
        return squared.clamp(min=0).sqrt() * self.scale

    @torch.no_grad()
    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        """Shrink both factors alike until the norm is at most `maximum`; (was it shrunk, the norm after)."""
        norm = self.delta_norm()
        clamped = norm.clamp(min=maximum / 2)
        ratio = clamped.clamp(max=maximum) / clamped
        for weight in (self.lora_down.weight, *(up.weight for up in self.ups())):
            weight.mul_(ratio.sqrt())
        return ratio != 1, norm * ratio

    @torch.no_grad()
    def merge(self, *, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        """Add the adapter to the layer's weight, in float32, rounded through `dtype` to its own."""
        weight = self.linear.weight
        where = device or weight.device
        merged = weight.to(device=where, dtype=torch.float32) + self.delta().to(where)
        weight.copy_(merged.to(dtype or weight.dtype))

    def export(self) -> dict[str, Tensor]:
        """Kohya's three tensors under their leaf names."""
        return {
            "lora_down.weight": self.lora_down.weight,
            "lora_up.weight": self.joined_up(),
            "alpha": self.alpha,
        }

    @torch.no_grad()
    def load(self, *, down: Tensor, up: Tensor, alpha: float) -> None:
        """Take over factors [r, in] and [out, r] from a file; raises `CheckpointError` if they cannot fit.

        A split layer takes block-diagonal factors of its total rank, or ordinary ones of its parts' rank
        (each part then starts from the same `down`).
        """
        if self.parts and down.shape[0] == self.part_rank:
            down, alpha = down.repeat(len(self.parts), 1), alpha * len(self.parts)
            up = block_diagonal(torch.split(up, list(self.parts)))
        wanted = (tuple(self.lora_down.weight.shape), (self.linear.out_features, self.rank))
        if (tuple(down.shape), tuple(up.shape)) != wanted:
            raise CheckpointError(
                f"{self.lora_name} has shapes {tuple(down.shape)} and {tuple(up.shape)} in the file and "
                f"{wanted[0]} and {wanted[1]} here; give the file's rank as network_dim, or dim_from_weights"
            )
        pieces = diagonal_blocks(up, self.parts) if self.parts else [up]
        if pieces is None:
            raise CheckpointError(
                f"{self.lora_name} is not split into q, k, v in the file; give network_args split_qkv=False"
            )
        self.lora_down.weight.copy_(down)
        for own, piece in zip(self.ups(), pieces, strict=True):
            own.weight.copy_(piece)
        self.alpha.fill_(alpha)

    @torch.no_grad()
    def gradient_row_norms(self) -> Tensor | None:
        """Row norms [out] of the gradient of `scale * up @ down`, float32; None before a backward pass."""
        grads = [up.weight.grad for up in self.ups()]
        if self.lora_down.weight.grad is None or any(grad is None for grad in grads):
            return None
        return gradient_row_norms(
            down=self.lora_down.weight.float(),
            up=self.joined_up().float(),
            grad_down=self.lora_down.weight.grad.float(),
            grad_up=block_diagonal([grad for grad in grads if grad is not None]).float(),
            scale=self.scale,
        )

    @torch.no_grad()
    def update_perturbation(self) -> None:
        """Refresh the norms GGPO needs, after a backward pass and before the gradients are cleared."""
        if self.perturbation is None:
            return
        self.perturbation.update(
            down=self.lora_down.weight.float(), up=self.joined_up().float(), scale=self.scale
        )
        gradient = self.gradient_row_norms()
        if gradient is not None:
            self.perturbation.gradient = gradient
