"""Gradient-guided perturbation (GGPO) of one adapted layer, after Kohya's `ggpo_sigma` and `ggpo_beta`.

In training the layer's weight is disturbed by noise whose standard deviation in output row i is

    (sigma * combined_i + beta * grad_i^2) / sqrt(out)

where combined_i is the norm of row i of base weight and adapter together, and grad_i the norm of row i of
the gradient of the product up @ down. Both follow from Gram matrices of the factors (rank x rank), so no
matrix of the weight's size is formed for them. The base weight's rows enter by their mean norm, taken once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SAMPLED_ROWS = 1000


class Perturbation(nn.Module):
    """The norms of one layer, zero before the first step; `sigma` and `beta` as in `network_args`.

    They are buffers, so a state holds them and a resumed run goes on as disturbed as it stopped; adapter
    files leave them out.
    """

    combined: Tensor  # [out], float32
    gradient: Tensor  # [out], float32

    def __init__(self, linear: nn.Linear, *, sigma: float, beta: float) -> None:
        super().__init__()
        self.sigma = sigma
        self.beta = beta
        self._linear = (linear,)
        # Scalar; read at first use, so that creation works without weights.
        self._base_norm: Tensor | None = None
        for name in ("combined", "gradient"):
            self.register_buffer(name, torch.zeros(linear.out_features))

    @torch.no_grad()
    def update(self, *, down: Tensor, up: Tensor, scale: Tensor) -> None:
        """Refresh the norms of `scale * up @ down`; `down` [rank, in], `up` [out, rank], float32."""
        if self._base_norm is None:
            weight = self._linear[0].weight
            step = max(1, -(-weight.shape[0] // _SAMPLED_ROWS))
            self._base_norm = weight[::step].float().norm(dim=1).mean().to(up.device)
        rows = _row_products(up, down @ down.T, up) * scale**2
        self.combined = (self._base_norm**2 + rows).clamp(min=0).sqrt()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The disturbance of the output for input `x` [..., in].

        A constant for autograd, as in Kohya's: otherwise every layer's noise, as large as its weight, would
        be kept for the backward pass.
        """
        shape = self._linear[0].weight.shape
        deviation = (self.sigma * self.combined + self.beta * self.gradient**2) / shape[0] ** 0.5  # [out]
        noise = torch.randn(shape, device=x.device, dtype=x.dtype)
        return nn.functional.linear(x, noise * deviation.to(x)[:, None])


def gradient_row_norms(
    *, down: Tensor, up: Tensor, grad_down: Tensor, grad_up: Tensor, scale: Tensor
) -> Tensor:
    """Row norms [out] of `scale * (up @ grad_down + grad_up @ down)`, from rank x rank products only."""
    squared = (
        _row_products(up, grad_down @ grad_down.T, up)
        + 2 * _row_products(up, grad_down @ down.T, grad_up)
        + _row_products(grad_up, down @ down.T, grad_up)
    )
    return (scale**2 * squared).clamp(min=0).sqrt()


def _row_products(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """Row-wise l_i^T M r_i: [out, rank], [rank, rank], [out, rank] -> [out]."""
    return ((left @ middle) * right).sum(dim=1)
