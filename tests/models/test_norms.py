"""Where branches enter and leave their stream in one pass: the operators against the layers they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import library as operators
from torch import nn

from library.models import norms, norms_formulas
from library.models.heads import EPSILON
from library.models.layers import ModulationOut

B, L, D = 2, 7, 48
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def norm(width: int = D, **options) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, **{"eps": EPSILON, **options})


def stream(*, trained: bool = True, width: int = D) -> torch.Tensor:
    return torch.randn(B, L, width).mul(2).add(1).requires_grad_(trained)


def modulation(*, trained: bool = True) -> ModulationOut:
    return ModulationOut(*(torch.randn(B, 1, D, requires_grad=trained) for _ in range(3)))


def differentiate(outputs, inputs):
    directions = [torch.linspace(-1, 1 + i, out.numel()).view(out.shape) for i, out in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, inputs, directions)]


def alike(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def branches(first, second, x, one, other, *, one_pass):
    """A double block's stream: its two branches are `one` and `other`, which see of the stream what they add up to."""
    own = norm()
    x, seen = first.enter(x, own, one_pass=one_pass)
    x, seen_later = first.leave_for(second, x, one * seen, own, one_pass=one_pass)
    return [seen, seen_later, second.leave(x, other * seen_later, one_pass=one_pass)]


def test_a_streams_way_past_two_branches():
    torch.manual_seed(0)
    x, one, other, first, second = stream(), stream(), stream(), modulation(), modulation()
    inputs = [x, one, other, *first, *second]
    found, plain = (
        differentiate(branches(first, second, x, one, other, one_pass=way), inputs) for way in (True, False)
    )
    alike(found, plain)


def test_modulation_behind_which_nothing_is_trained_gets_no_gradient():
    torch.manual_seed(0)
    x, one, other = stream(), stream(), stream()
    first, second = modulation(trained=False), modulation(trained=False)
    found, plain = (
        differentiate(branches(first, second, x, one, other, one_pass=way), [x, one, other])
        for way in (True, False)
    )
    alike(found, plain)
    shift = first.shift.clone().requires_grad_(True)
    found, plain = (
        differentiate(first._replace(shift=shift).enter(x, norm(), one_pass=way), [x, shift])
        for way in (True, False)
    )
    alike(found, plain)


def test_what_goes_along_the_stream_keeps_its_dtype():
    torch.manual_seed(0)
    x, mod = stream().bfloat16(), ModulationOut(*(part.bfloat16() for part in modulation()))
    same, seen = mod.enter(x, norm(), one_pass=True)
    assert torch.equal(same, x)
    later, seen_later = mod.leave_for(mod, x, seen, norm(), one_pass=True)
    left = mod.leave(later, seen_later, one_pass=True)
    assert {made.dtype for made in (seen, later, seen_later, left)} == {torch.bfloat16}
    exact = ModulationOut(*(part.float() for part in mod)).enter(x.float(), norm(), one_pass=False)[1]
    torch.testing.assert_close(seen.float(), exact, rtol=2**-8, atol=1e-6)  # one rounding


def test_the_operators_hold_torchs_contract():
    torch.manual_seed(0)
    own, (shift, scale, gate) = torch.ops.polyrank, modulation(trained=False)
    x, branch, grad_stream, grad_y = (torch.randn(B, D, L).transpose(1, 2) for _ in range(4))
    stream_after, _, mean, size = own.leave_and_enter(x, gate, branch, shift, scale)
    saved = (grad_stream, grad_y, stream_after)
    for operator, arguments in (
        (own.enter, (x, shift, scale)),
        (own.leave_and_enter, (x, gate, branch, shift, scale)),
        (own.enter_backward, (*saved, scale, mean, size, True)),
        (own.enter_backward, (*saved, scale, mean, size, False)),
        (own.leave_and_enter_backward, (*saved, gate, branch, scale, mean, size, True)),
        (own.leave_and_enter_backward, (*saved, gate, branch, scale, mean, size, False)),
        (own.leave_backward, (grad_y, gate, branch)),
    ):
        operators.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_normalisations_that_are_replaced_or_of_another_kind_are_left_to_the_layers():
    assert norms.fits([norm(), norm()])
    replaced = norm()
    replaced.forward = lambda x: x
    watched = norm()
    watched.register_forward_hook(lambda *_: None)
    for other in (replaced, watched, norm(eps=1e-5), nn.LayerNorm(D, eps=EPSILON), nn.Identity()):
        assert not norms.fits([norm(), other])


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [48, 3072])
def test_kernels_compute_what_the_formulas_say(dtype, width, monkeypatch):
    device = torch.device("cuda")
    assert norms._kernels(device) is not None, "they failed their trial"
    torch.manual_seed(0)

    def made(tokens):
        return torch.randn(B, tokens, width + 16, device=device).to(dtype)[..., 16:]  # not side by side

    x, branch, grad_stream, grad_y = (made(301) for _ in range(4))
    shift, scale, gate = (made(1) for _ in range(3))
    sizes = torch.rand(B, 301, device=device) + 0.5
    means = torch.rand(B, 301, device=device)

    def all_of_it():
        back = (grad_stream, grad_y, x)
        return [
            *norms._enter(x, shift, scale),
            *norms._leave_and_enter(x, gate, branch, shift, scale),
            *norms._enter_backward(*back, scale, means, sizes, True),
            *norms._leave_and_enter_backward(*back, gate, branch, scale, means, sizes, True),
            *norms._leave_backward(grad_y, gate, branch),
        ]

    found, again = all_of_it(), all_of_it()
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    monkeypatch.setattr(norms, "_ways", lambda x: norms_formulas)
    tolerance = {torch.bfloat16: 0.02, torch.float16: 0.003, torch.float32: 1e-4}[dtype]
    for one, other in zip(found, all_of_it(), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))
