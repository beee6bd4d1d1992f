"""Products that carry a low-rank product within: against the plain sum, and which layers of a model have them."""

from __future__ import annotations

import pytest
import torch
from model_examples import difference, flux_inputs, flux_params, random_flux, wide_weight
from torch import library as operators
from torch import nn

from library.config.sections.network import NetworkConfig
from library.models import carried, carrying, frozen, scaled_mm
from library.models.precision import block_linears
from networks.interface import create
from networks.layers import Dropouts, Factors, LoRALinear

TOKENS, INNER, OUTER, RANK = 40, 64, 48, 4
PARAMS = flux_params(depth=1, singles=1)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def layer(
    kind: str | None, *, room: bool = True, keep_transposed: bool = True, device: str = "cpu"
) -> nn.Linear:
    """A frozen layer that joins, stored as `kind` (None: as it is), with room for a rank."""
    torch.manual_seed(0)
    made = nn.Linear(INNER, OUTER).requires_grad_(False).to(device)
    if kind is not None:
        frozen.store_scaled(made, kind, keep_transposed=keep_transposed)
    frozen.install_joining(made)
    if room:
        frozen.make_room(made, RANK, torch.float32)
    return made


def inputs() -> torch.Tensor:
    torch.manual_seed(1)
    tokens = torch.randn(TOKENS, INNER) * torch.logspace(-1, 1, TOKENS)[:, None]
    return tokens.view(2, -1, INNER).requires_grad_(True)


def factors(down: float = 1.0, up: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    first, second = torch.randn(RANK, INNER) * down, torch.randn(OUTER, RANK) * up
    return first.requires_grad_(True), second.requires_grad_(True)


def written(linear: nn.Linear, low_rank: tuple[torch.Tensor, torch.Tensor]) -> nn.Linear:
    """The layer with the factors where its product reads them."""
    down, up = low_rank
    one = Factors(down, [up], torch.tensor(float(RANK), device=down.device), RANK, 1.0)
    carrying.Carrying([(linear, lambda: one)]).write()
    return linear


def run(linear: nn.Linear, low_rank: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of the input and the factors."""
    x = inputs()
    out = linear.forward(x) if low_rank is None else linear.forward(x, low_rank=low_rank)
    torch.manual_seed(3)
    leaves = (x, *(low_rank or ()))
    return out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))


def test_a_wide_product_that_carries_is_the_sum_of_both():
    low_rank = factors()
    wanted = run(layer(None, room=False), low_rank)
    for got, expected in zip(run(written(layer(None), low_rank), low_rank), wanted, strict=True):
        assert difference(got, expected) < 1e-5


@needs_gpu
@pytest.mark.parametrize("tokens", [40, 3000])
def test_a_gpu_carries_in_16_bits(tokens):
    """Few rows and many, up to the rounding of the sum of both."""
    torch.manual_seed(0)
    linear = nn.Linear(INNER, OUTER, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    low_rank = [factor.detach().cuda().requires_grad_(True) for factor in factors(0.1, 0.1)]
    x, direction = (torch.randn(tokens, side, device="cuda").bfloat16() for side in (INNER, OUTER))
    x.requires_grad_(True)
    frozen.install_joining(linear)
    found = []
    for room in (False, True):
        if room:
            assert frozen.make_room(linear, RANK, torch.bfloat16)
            written(linear, low_rank)
        out = linear.forward(x, low_rank=low_rank)
        found.append((out, *torch.autograd.grad(out, (x, *low_rank), direction)))
    for one, other in zip(*found, strict=True):
        assert difference(other, one) < 0.01


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("up", [1e-5, 1e-3, 1e-1, 1.0])
@pytest.mark.parametrize("down", [1e-2, 1.0])
def test_two_numbers_of_8_bits_are_as_good_as_bfloat16_at_any_size(down, up, device):
    """What lies behind the columns of both factors is the low-rank product, for forward and backward."""
    low_rank = [factor.to(device) for factor in factors(down, up)]
    linear = written(layer("fp8", device=device), low_rank)
    first, second = (factor.detach() for factor in low_rank)
    x, scale = inputs().detach().flatten(0, 1).to(device), linear.weight_scale
    grad = torch.randn(TOKENS, OUTER, device=device)
    more = carried.columns(RANK, frozen.FP8)
    for rows, weights, hidden, balance, beside, product in (
        (x, None, x @ first.T, linear.balance[:1], linear.room[:, INNER:], x @ first.T @ second.T / scale),
        (grad, scale, grad @ second, linear.balance[1:], linear.behind, grad @ second @ first),
    ):
        made, by_row = carried.rows(rows, weights, hidden, more, balance)
        columns = made[:, rows.shape[1] :].float() * by_row
        assert difference(columns @ beside[:, : columns.shape[1]].float().T, product) < 0.004


@pytest.mark.parametrize("keep_transposed", [True, False])
@pytest.mark.parametrize("up", [1e-3, 1e-2, 1.0])
def test_an_fp8_product_that_carries_is_the_sum_of_both(up, keep_transposed):
    low_rank = factors(up=up)
    linear = written(layer("fp8", keep_transposed=keep_transposed), low_rank)
    # A large product changes the scales that the rest is rounded with.
    tolerance = 1e-4 if up < 1e-2 else 0.03
    wanted = run(layer("fp8", room=False), low_rank)
    for got, expected in zip(run(linear, low_rank), wanted, strict=True):
        assert difference(got, expected) < tolerance


def test_a_product_larger_than_the_rest_stays_in_range():
    low_rank = factors(30.0, 30.0)
    linear = written(layer("fp8"), low_rank)
    wanted = run(layer("fp8", room=False), low_rank)
    for got, expected in zip(run(linear, low_rank), wanted, strict=True):
        assert torch.isfinite(got).all()
        assert difference(got, expected) < 0.01


def test_new_up_factors_are_zero_and_change_nothing():
    low_rank = factors(up=0.0)
    linear = written(layer("fp8"), low_rank)
    out, grad_x, _, grad_up = run(linear, low_rank)
    base, base_grad = run(layer("fp8"), None)
    torch.testing.assert_close(out, base)
    torch.testing.assert_close(grad_x, base_grad)
    assert float(grad_up.abs().max()) > 0


def test_the_weight_is_what_it_was():
    for kind in (None, "fp8"):
        with_room, without = layer(kind), layer(kind, room=False)
        torch.testing.assert_close(wide_weight(with_room), wide_weight(without), rtol=0, atol=0)
        for got, wanted in zip(run(with_room, None), run(without, None), strict=True):
            torch.testing.assert_close(got, wanted)


def test_rows_far_smaller_than_others_get_a_scale_that_carries():
    linear = nn.Linear(INNER, OUTER, bias=False).requires_grad_(False)
    with torch.no_grad():
        linear.weight[:4] *= 1e-6
        linear.weight[4] = 0
    frozen.store_scaled(linear, "fp8", keep_transposed=True)
    before = wide_weight(linear).clone()
    frozen.install_joining(linear)
    frozen.make_room(linear, RANK, torch.float32)
    after = wide_weight(linear)
    torch.testing.assert_close(after[5:], before[5:], rtol=0, atol=0)
    assert float((after - before).abs().max()) < 1e-3 * float(before.abs().max())
    low_rank = factors(1.0, 1e-3)
    written(linear, low_rank)
    out, base = run(linear, low_rank)[0], run(linear, None)[0]
    wanted = (inputs() @ low_rank[0].T @ low_rank[1].T)[..., :5]
    assert difference((out - base)[..., :5], wanted) < 0.01


def test_the_operators_hold_torchs_contract():
    for kind in (None, "fp8"):
        linear, x = written(layer(kind), factors()), inputs().detach().flatten(0, 1)
        down, up = linear.carried_down, linear.carried_up
        scale, balance = (None, None) if kind is None else (linear.weight_scale, linear.balance)
        first = (x, linear.room, scale, linear.bias, down, up, balance)
        checks = ("test_schema", "test_faketensor")[kind is not None :]  # the first multiplies 8 bits
        operators.opcheck(torch.ops.polyrank.carried, first, test_utils=checks)
        out, hidden = torch.ops.polyrank.carried(*first)
        room = linear.room if kind is None else linear.weight_transposed
        operators.opcheck(
            torch.ops.polyrank.carried_backward,
            (torch.randn_like(out), room, scale, x, hidden, up, balance),
            test_utils=checks,
        )


def test_columns_keep_rows_aligned():
    for dtype, rank, wanted in (
        (frozen.FP8, 16, (128, 48)), (frozen.FP8, 43, (256, 144)), (torch.bfloat16, 16, (64, 16)),
        (torch.bfloat16, 65, (128, 72)),
    ):  # fmt: skip
        assert (carried.columns(rank, dtype), carried.used_columns(rank, dtype)) == wanted


def applied(*network_args: str, fp8: bool = True) -> nn.Module:
    torch.manual_seed(0)
    transformer = random_flux(PARAMS)
    for linear in block_linears(transformer):
        if fp8:
            frozen.store_scaled(linear, "fp8", keep_transposed=True)
        frozen.install_joining(linear)
    config = NetworkConfig(network_module="networks.lora_flux", network_dim=4, network_args=network_args)
    network = create(config, text_encoders=[], transformer=transformer)
    network.apply()
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.module.named_parameters():
            if "lora_up" in name:
                parameter.normal_(std=0.02)
    transformer.network = network
    return transformer


def outcome(model: nn.Module, *, asides: int = 0) -> dict[str, torch.Tensor]:
    """Output and gradients; with predictions of the model without the network, before the backward pass."""
    model.network.module.zero_grad()
    out = model(**flux_inputs(PARAMS))
    for _ in range(asides):
        model.network.set_multiplier(0.0)
        with torch.no_grad():
            model(**flux_inputs(PARAMS))
        model.network.set_multiplier(1.0)
        with torch.no_grad():
            model(**flux_inputs(PARAMS))
    out.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in model.network.module.named_parameters()}
    return {"output": out.detach(), **grads}


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("arguments", [(), ("split_qkv=True",)])
def test_a_model_carries_what_its_adapter_adds(arguments, fp8):
    model, reference = applied(*arguments, fp8=fp8), applied(*arguments, fp8=fp8)
    model.before_forward = carrying.carry(block_linears(model), dtype=torch.float32)
    assert model.before_forward is not None
    assert all(frozen.carries(linear) for linear in block_linears(model))
    for _ in range(2):
        wanted = outcome(reference)
        for name, found in outcome(model, asides=2).items():
            assert difference(found, wanted[name]) < (0.03 if fp8 else 1e-4), name
        for one in (model, reference):  # what follows is the next step's
            with torch.no_grad():
                for parameter in one.network.module.parameters():
                    parameter.mul_(1.5)


def test_the_transposed_copy_may_come_later():
    """As when there is found to be memory for it."""
    model, reference = applied(), applied()
    for one in (model, reference):
        one.before_forward = carrying.carry(block_linears(one), dtype=torch.float32)
    for linear in block_linears(model):
        frozen.keep_transposed_copy(linear)
        del linear.weight_transposed
    first, wanted = outcome(model), outcome(reference)
    for linear in block_linears(model):
        frozen.keep_transposed_copy(linear)
    second = outcome(model)
    for name, expected in wanted.items():
        torch.testing.assert_close(first[name], expected)
        torch.testing.assert_close(second[name], expected)


def test_weights_may_be_elsewhere_for_a_while():
    model = applied()
    model.before_forward = carrying.carry(block_linears(model), dtype=torch.float32)
    first = outcome(model)
    own = {name: parameter.data for name, parameter in model.network.module.named_parameters()}
    for parameter in model.network.module.parameters():
        parameter.data = parameter.data * 2
    assert difference(outcome(model)["output"], first["output"]) > 1e-3
    for name, parameter in model.network.module.named_parameters():
        parameter.data = own[name]
    again = outcome(model)
    for name, expected in first.items():
        torch.testing.assert_close(again[name], expected)


def test_a_strength_of_zero_is_written_where_something_is_trained():
    model, plain = applied(), applied()
    for one in (model, plain):
        one.before_forward = carrying.carry(block_linears(one), dtype=torch.float32) if one is model else None
    outcome(model)
    outs = []
    for one in (model, plain):
        one.network.set_multiplier(0.0)
        outs.append(one(**flux_inputs(PARAMS)))
    assert difference(*outs) < 0.01


def test_high_ranks_are_joined_as_before():
    linear = nn.Linear(INNER, OUTER)
    frozen.install_joining(linear)
    assert not frozen.make_room(linear, carried.MOST + 1, torch.float32)
    assert frozen.make_room(linear, carried.MOST, torch.float32)


def test_a_card_whose_fp8_products_skip_gaps_between_rows_is_found_out(monkeypatch):
    def packed(x, by_row, second, *others):
        """As kernels do that take the number of columns for the step from row to row."""
        one, other = (t.as_strided(t.shape, (t.shape[1], 1)) for t in (x, second.t()))
        return multiply(one, by_row, other.t(), *others)

    found_out, cpu = scaled_mm.skips_gaps.__wrapped__, torch.device("cpu")
    assert not found_out(cpu)
    multiply = scaled_mm.multiply
    monkeypatch.setattr(scaled_mm, "multiply", packed)
    assert found_out(cpu)


def test_what_comes_between_the_factors_is_not_carried():
    model = applied()
    for module in model.network.module.modules():
        if isinstance(module, LoRALinear):
            module.dropouts = Dropouts(rank=0.1)
    assert carrying.carry(block_linears(model), dtype=torch.float32) is None
    assert not any(frozen.carries(linear) for linear in block_linears(model))


def test_what_comes_between_the_factors_later_is_joined():
    model, plain = applied(), applied()
    model.before_forward = carrying.carry(block_linears(model), dtype=torch.float32)
    outs = []
    for one in (model, plain):
        for module in one.network.module.modules():
            if isinstance(module, LoRALinear):
                module.dropouts = Dropouts(rank=0.1)
        torch.manual_seed(0)
        outs.append(one.train()(**flux_inputs(PARAMS)))
    assert difference(*outs) < 0.01
