"""diff_output_preservation: some samples are held to the answer of the model without its network.

Training and validation ask alike, or a validation loss would judge those samples by a target they never had.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from library.adapters.base import StepInputs
from library.flow.objective import Draw, Objective
from networks.interface import NetworkHandle


@torch.no_grad()
def preserve_output(
    draw: Draw,
    inputs: StepInputs,
    preserve: Tensor,
    *,
    module: nn.Module,
    network: NetworkHandle,
    objective: Objective,
    ranks: int,
) -> Draw:
    """The draw with the frozen model's answer as the target of the samples in `preserve` [B].

    With several ranks every rank asks in every micro-step: a backend may need all of them in a forward pass.
    """
    if ranks == 1 and not bool(preserve.any()):
        return draw
    network.set_multiplier(0.0)
    answer = module(draw.x_t, draw.t, inputs.cond)
    network.set_multiplier(1.0)
    chosen = preserve.to(draw.target.device).view(-1, 1, 1, 1)
    return replace(draw, target=torch.where(chosen, objective.estimate(answer, draw), draw.target))
