"""Loss scaling with fp16 gradients, as full_fp16 has them, and with float32 ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from library.distributed.precision import LossScaler, is_lost


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_are_unscaled_and_an_overflow_skips_the_update(dtype):
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = LossScaler(device=torch.device("cpu"), dtype=torch.float16)
    scale = scaler.state()["scale"]
    scaler.backward((weight.float() * torch.tensor([0.25, 0.5])).sum())
    assert weight.grad.tolist() == [0.25 * scale, 0.5 * scale]
    norm = scaler.clip(optimizer, [weight], 0.0)
    assert weight.grad.tolist() == [0.25, 0.5]
    assert float(norm) == pytest.approx(0.3125**0.5, rel=1e-3)
    assert scaler.step(optimizer)
    assert weight.tolist() == [0.875, 1.75]
    optimizer.zero_grad(set_to_none=True)
    scaler.backward(weight.float().sum() * float("inf"))
    scaler.clip(optimizer, [weight], 1.0)
    assert not scaler.step(optimizer)
    assert weight.tolist() == [0.875, 1.75]
    assert scaler.state()["scale"] == scale / 2


def test_an_overflow_that_no_scale_mends_ends_the_run():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = LossScaler(device=torch.device("cpu"), dtype=torch.float16)
    skipped = 0
    while not is_lost(1.0, float("inf"), scaler.state()):
        scaler.backward(weight.sum() * float("inf"))
        scaler.clip(optimizer, [weight], 1.0)
        assert not scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        skipped += 1
        assert skipped < 100
    assert skipped > 16  # from 65536 down: an overflow now and then is nothing
    assert weight.tolist() == [1.0, 1.0]
    assert is_lost(float("nan"), 1.0, scaler.state())
    assert is_lost(1.0, float("nan"), {})
    assert not is_lost(1.0, 1.0, {})
