"""Prodigy on ZeRO's pieces. Source: Mishchenko and Defazio, "Prodigy", arXiv 2306.06101, algorithm 4.

Prodigy estimates the distance to the solution from two sums over all that is trained. On a piece they would be
another estimate on every rank. prodigyopt has a mode for split parameters, which needs a GPU and fails while the
learning rate is 0, as in the first step of a warm-up; so its step is done here, on its own groups and under its own
names of state, with the sums taken over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def step_on_pieces(optimizer: Optimizer, *, total: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """Make `optimizer.step` right for a piece, where its own is not: if it is a Prodigy. `total` sums over ranks."""
    if type(optimizer).__name__ != "Prodigy":
        return

    @wraps(optimizer.step)  # with the mark of the learning-rate schedule that counts steps
    def step(closure: None = None) -> None:
        del closure
        prodigy_step(optimizer, total=total, device=device)
        optimizer.__dict__["_opt_called"] = True  # what that schedule looks for

    optimizer.__dict__["step"] = step


@torch.no_grad()
def prodigy_step(optimizer: Optimizer, *, total: Callable[[Tensor], Tensor], device: torch.device) -> None:
    """One step of the one group that has gradients; every rank calls it, with its piece or with none."""
    group = next(group for group in optimizer.param_groups if group["params"])
    beta1, beta2 = group["betas"]
    beta3 = math.sqrt(beta2) if group["beta3"] is None else group["beta3"]
    d, d0, rate, decay = group["d"], group["d0"], group["lr"], group["weight_decay"]
    if rate == 0:
        return
    effective = d * rate
    if group["use_bias_correction"]:
        number = group["k"] + 1
        effective *= math.sqrt(1 - beta2**number) / (1 - beta1**number)
    weight = d / d0 * (d if group["safeguard_warmup"] else effective)

    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of gradient . (start - now), of |s|
    pieces = [parameter for parameter in group["params"] if parameter.grad is not None]
    for piece in pieces:
        state = optimizer.state[piece]
        if not state:
            _begin(state, piece, with_mean=beta1 > 0)
        if decay and not group["decouple"]:
            piece.grad.add_(piece, alpha=decay)
        sums += _accumulate(state, piece, group, beta3=beta3, weight=weight).to(device)
    progress, denominator = total(sums).tolist()
    if denominator == 0:
        return

    numerator = group["d_numerator"] * beta3 + d / d0 * effective * progress
    _set_distance(group, numerator=numerator, denominator=denominator)
    for piece in pieces:
        state = optimizer.state[piece]
        state["step"] += 1
        if decay and group["decouple"]:
            piece.mul_(1 - decay * effective)
        spread = state["exp_avg_sq"].sqrt().add_(group["d"] * group["eps"])
        if beta1 > 0:
            piece.addcdiv_(state["exp_avg"], spread, value=-effective)
        else:
            piece.addcdiv_(piece.grad, spread, value=-effective * d)
    group["k"] += 1


def _accumulate(
    state: dict[str, Any], piece: Tensor, group: dict[str, Any], *, beta3: float, weight: float
) -> Tensor:
    """Take the gradient into the running means; returns this piece's part of the two sums, [2]."""
    gradient, (beta1, beta2), d = piece.grad, group["betas"], group["d"]
    assert gradient is not None, "pieces without a gradient are left out"
    if beta1 > 0:
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=d * (1 - beta1))
    state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=d * d * (1 - beta2))
    state["s"].mul_(beta3).add_(gradient, alpha=weight)
    return torch.stack([torch.dot(gradient, state["p0"] - piece), state["s"].abs().sum()]).double()


def _begin(state: dict[str, Any], piece: Tensor, *, with_mean: bool) -> None:
    state["step"] = 0
    state["s"] = torch.zeros_like(piece)
    state["p0"] = piece.detach().clone()
    if with_mean:
        state["exp_avg"] = torch.zeros_like(piece)
    state["exp_avg_sq"] = torch.zeros_like(piece)


def _set_distance(group: dict[str, Any], *, numerator: float, denominator: float) -> None:
    """Take up the new estimate d; it never falls, and grows by at most `growth_rate` after its first rise."""
    estimate = group["d_coef"] * numerator / denominator
    d = max(group["d"], estimate) if group["d"] == group["d0"] else group["d"]
    largest = max(group["d_max"], estimate)
    group.update(
        d=min(largest, d * group["growth_rate"]), d_max=largest, d_hat=estimate, d_numerator=numerator,
        d_denom=denominator,
    )  # fmt: skip
