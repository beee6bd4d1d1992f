"""Parameter groups of a small network, for optimizer tests."""

from typing import NamedTuple

import torch


class Group(NamedTuple):
    name: str
    params: list[torch.nn.Parameter]
    lr: float | None


def network(seed: int = 0) -> torch.nn.Sequential:
    """Large enough in its first layer (4096 weights) for 8-bit states; the second stays in 32 bits."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3, bias=False))


def groups(module: torch.nn.Sequential, lr: float | None = None) -> list[Group]:
    return [Group("first", list(module[0].parameters()), lr), Group("last", list(module[2].parameters()), lr)]


def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    """Steps on data that depend on the step's number only; the losses before each."""
    losses = []
    for step in steps:
        inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        loss = (module(inputs) - inputs[:, :3].sin()).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
