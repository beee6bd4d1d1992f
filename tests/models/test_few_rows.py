"""Weights with a scale for each group of inputs: how near they are, and each way of multiplying them."""

from __future__ import annotations

import pytest
import torch
from model_examples import difference, flux_inputs, flux_params, random_flux, wide_weight
from torch import library as operators
from torch import nn

from library.models import few_rows, frozen
from library.models.activation_checkpoint import is_dear
from library.models.flux import Flux
from library.models.layers import Modulation
from library.models.precision import block_weights, is_modulation_weight, store_blocks_in_fp8
from library.train.speed import Speed
from tools.bench_train import parse

ROWS, OUTER, RANK = 3, 24, 4
INNER = 2 * few_rows.GROUP + 44  # the last group is shorter
PARAMS = flux_params(depth=1, singles=1)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def layer() -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(INNER, OUTER).requires_grad_(False)
    with torch.no_grad():  # rows, and groups within a row, of very different size
        made.weight.mul_(torch.logspace(-3, 1, OUTER)[:, None])
        made.weight.mul_(torch.tensor([1.0, 0.01, 100.0]).repeat_interleave(few_rows.GROUP)[:INNER])
    return made


def inputs(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, INNER).to(dtype).requires_grad_(True)


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(RANK, INNER, requires_grad=True), torch.randn(OUTER, RANK, requires_grad=True)


def test_every_group_is_as_near():
    linear, plain = layer(), layer().weight
    frozen.store_grouped(linear)
    assert (linear.weight.dtype, linear.weight.shape) == (torch.int8, (OUTER, INNER))
    assert not frozen.is_scaled(linear)
    found = wide_weight(linear)
    for one, other in zip(
        found.split(few_rows.GROUP, dim=1), plain.split(few_rows.GROUP, dim=1), strict=True
    ):
        assert float(((one - other).norm(dim=1) / other.norm(dim=1)).max()) < 0.01


def test_what_int8_can_hold_is_held_exactly_and_zeros_are_zeros():
    weight = torch.randint(-127, 128, (OUTER, INNER)).float()
    weight[:, :: few_rows.GROUP] = 127
    weight[3] = 0
    assert torch.equal(few_rows.widened(*few_rows.grouped(weight * 0.25), torch.float32), weight * 0.25)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_weight_is_rounded(dtype, joined):
    linear = layer().to(dtype)
    linear.bias.requires_grad_(True)
    frozen.store_grouped(linear)
    frozen.install_joining(linear)
    (down, up), (plain_down, plain_up) = factors(), factors()
    x, reference, bias = inputs(dtype), inputs(dtype), linear.bias.detach().float().requires_grad_(True)
    low_rank = {"low_rank": (down, up)} if joined else {}
    out = linear.forward(x, **low_rank)
    expected = nn.functional.linear(reference.float(), wide_weight(linear), bias)
    if joined:
        expected = expected + (reference.float() @ plain_down.T) @ plain_up.T
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert out.dtype == dtype
    assert difference(out, expected) < tolerance
    direction = torch.randn_like(expected)
    out.backward(direction.to(dtype))
    expected.backward(direction)
    pairs = [(x, reference), (linear.bias, bias)]
    for got, wanted in [*pairs, (down, plain_down), (up, plain_up)] if joined else pairs:
        assert difference(got.grad, wanted.grad) < tolerance


def test_the_operators_hold_torchs_contract():
    linear, x, (down, up) = layer(), inputs().detach(), factors()
    frozen.store_grouped(linear)
    stored, checks = (linear.weight, linear.group_scale), ("test_schema", "test_faketensor")
    for bias in (linear.bias, None):
        operators.opcheck(torch.ops.polyrank.few_rows, (x, *stored, bias), test_utils=checks)
    operators.opcheck(
        torch.ops.polyrank.joined, (x, None, None, *stored, linear.bias, down.detach(), up.detach()),
        test_utils=checks,
    )  # fmt: skip
    assert is_dear(torch.ops.polyrank.few_rows.default, (x, *stored, None)), "few rows are kept"


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("narrow", [False, True])
def test_modulation_layers_are_stored_so(kind, narrow):
    """Whether the file has 16 bits or 8."""
    model = random_flux(PARAMS)
    if narrow:
        store_blocks_in_fp8(model)
    before = {name: wide_weight(linear) for name, linear in block_weights(model).items()}
    config = parse(["--base_compute", kind, "--mixed_precision", "bf16"])[1]
    Speed(config, torch.device("cpu")).before_network(model)
    modulations = {
        f"{name}.lin.weight" for name, made in model.named_modules() if isinstance(made, Modulation)
    }
    for name, linear in block_weights(model).items():
        assert frozen.is_grouped(linear) == is_modulation_weight(name) == (name in modulations)
        assert frozen.is_scaled(linear) == (name not in modulations)
        if name in modulations:
            assert difference(wide_weight(linear), before[name]) < 0.005


def test_shifts_scales_and_gates_are_nearer_than_with_rounded_activations():
    errors = []
    for store in (frozen.store_grouped, scaled):
        model, exact = random_flux(PARAMS), random_flux(PARAMS)
        for name, linear in block_weights(model).items():
            if is_modulation_weight(name):
                store(linear)
        errors.append(error(model, exact))
    assert errors[0] < errors[1] / 4


def scaled(linear: nn.Linear) -> None:
    frozen.store_scaled(linear, "fp8", keep_transposed=False)


def error(model: Flux, exact: Flux) -> float:
    found, wanted = (one(**flux_inputs(PARAMS)).detach() for one in (model, exact))
    return float((found - wanted).norm() / wanted.norm())


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inner", "outer"), [(3072, 18432), (100, 70), (128, 64), (640, 33), (3071, 9)])
def test_the_kernel_computes_what_the_formula_says(inner, outer, dtype):
    device = torch.device("cuda")
    assert few_rows._kernel(device) is not None, "it failed its trial"
    torch.manual_seed(0)
    stored = few_rows.grouped(torch.randn(outer, inner, device=device))
    bias = torch.randn(outer, device=device, dtype=dtype)
    for rows in (1, 2, 5, 16, 32, 33):
        x = torch.randn(rows, inner, device=device, dtype=dtype)
        wanted = x.float() @ few_rows.widened(*stored, torch.float32).T
        for with_bias in (None, bias):
            found = few_rows.multiply(x, *stored, with_bias)
            assert found.dtype == dtype
            assert difference(found, wanted if with_bias is None else wanted + bias) < 0.01
            assert torch.equal(found, few_rows.multiply(x, *stored, with_bias))
