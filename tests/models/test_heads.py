"""Queries, keys and values taken apart in one pass: the operators against the layers they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import library as operators
from torch import nn

from library.models import heads, rounding
from library.models.gelu import GELU, gelu, slope
from library.models.layers import QKNorm, normalised, rotated
from library.models.rope import Rotation

B, T, N, H, D, M = 2, 3, 5, 3, 16, 40
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def rotation(tokens: int, device: str = "cpu") -> Rotation:
    angles = torch.randn(B, 1, tokens, D // 2, device=device)
    return Rotation(angles.cos(), angles.sin())


def norm() -> QKNorm:
    made = QKNorm(D)
    for scale in made.parameters():
        nn.init.uniform_(scale, 0.5, 2)
        scale.requires_grad_(False)
    return made


def differentiate(outputs, inputs):
    directions = [torch.linspace(-1, 1, out.numel()).view(out.shape) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, directions)]


def alike(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_single_blocks_half_and_half():
    torch.manual_seed(0)
    inner, turn, own = torch.randn(B, T, 3 * H * D + M, requires_grad=True), rotation(T), norm()
    found, mlp = heads.split_inner(inner, own.scales, turn, H)
    plain = rotated(*normalised(inner[..., : 3 * H * D], own, H), turn)
    activated = nn.functional.gelu(inner[..., 3 * H * D :], approximate="tanh")
    alike(differentiate([*found, mlp], [inner]), differentiate([*plain, activated], [inner]))


def test_two_streams_joined():
    torch.manual_seed(0)
    text, image = (torch.randn(B, count, 3 * H * D, requires_grad=True) for count in (T, N))
    turn, of_text, of_image = rotation(T + N), norm(), norm()
    found = heads.join_streams(text, image, of_text.scales, of_image.scales, turn, H)
    parts = (normalised(text, of_text, H), normalised(image, of_image, H))
    plain = rotated(*(torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)), turn)
    alike(differentiate([*found], [text, image]), differentiate([*plain], [text, image]))


def test_the_operators_hold_torchs_contract():
    torch.manual_seed(0)
    inner, turn, own = torch.randn(B, T, 3 * H * D + M), rotation(T), norm()
    split = (inner, *own.scales, *turn, H)
    operators.opcheck(torch.ops.polyrank.split_heads, split, test_utils=("test_schema", "test_faketensor"))
    grads = tuple(torch.randn(B, H, T, D) for _ in range(3))
    operators.opcheck(
        torch.ops.polyrank.split_heads_backward, (*grads, torch.randn(B, T, M), *split),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_what_a_network_trains_or_replaces_is_left_to_the_layers():
    assert heads.fits([norm(), norm()])
    trained, replaced = norm(), norm()
    trained.key_norm.scale.requires_grad_(True)
    replaced.query_norm.forward = lambda x: x
    watched = norm()
    watched.key_norm.register_forward_hook(lambda *_: None)
    for other in (trained, replaced, watched):
        assert not heads.fits([norm(), other])


def test_gelu_by_the_sigmoid_is_gelu_by_the_tanh():
    x = torch.linspace(-8, 8, 2001, dtype=torch.float32, requires_grad=True)
    plain = GELU()(x)
    torch.testing.assert_close(gelu(x), plain, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(plain.sum(), x)
    torch.testing.assert_close(slope(x.detach()), grad, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_compute_what_the_formulas_say(dtype, monkeypatch):
    device = torch.device("cuda")
    assert heads._kernels(device) is not None, "they failed their trial"
    assert rounding._kernel(device) is not None, "it failed its trial"
    torch.manual_seed(0)
    inner = torch.randn(B, T, 3 * H * D + M, device=device, dtype=dtype)
    text, image = (torch.randn(B, count, 3 * H * D, device=device, dtype=dtype) for count in (T, N))
    scales = [torch.rand(D, device=device, dtype=dtype) + 0.5 for _ in range(4)]
    of_inner, of_both = rotation(T, "cuda"), rotation(T + N, "cuda")
    grads = [torch.randn(B, T, H, D, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    joint = [torch.randn(B, T + N, H, D, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]
    grad_mlp = torch.randn(B, T, M + 8, device=device, dtype=dtype)[..., 8:]

    def all_of_it():
        return [
            *heads._split_heads(inner, *scales[:2], *of_inner, H),
            heads._split_heads_backward(*grads, grad_mlp, inner, *scales[:2], *of_inner, H),
            *heads._join_heads(text, image, *scales, *of_both, H),
            *heads._join_heads_backward(*joint, text, image, *scales, *of_both, H),
        ]

    found = all_of_it()
    monkeypatch.setattr(heads, "_plain", lambda x: True)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(found, all_of_it(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
