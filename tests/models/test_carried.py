"""Products that carry a low-rank product within: against the plain sum, and which layers of a model have them."""

from __future__ import annotations

import pytest
import torch
from model_examples import difference, flux_inputs, flux_params, random_flux, wide_weight
from torch import library as operators
from torch import nn

from library.config.sections.network import NetworkConfig
from library.models import carried, carrying, frozen
from library.models.precision import block_linears
from networks.interface import create
from networks.layers import Factors

TOKENS, INNER, OUTER, RANK = 40, 64, 48, 4


def layer(kind: str | None, *, room: bool = True, keep_transposed: bool = True) -> nn.Linear:
    """A frozen layer that joins, stored as `kind` (None: as it is), with room for a rank."""
    torch.manual_seed(0)
    made = nn.Linear(INNER, OUTER).requires_grad_(False)
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


def set_balance(linear: nn.Linear, down: torch.Tensor, up: torch.Tensor) -> None:
    one = Factors(down, [up], torch.tensor(float(RANK)), RANK)
    carrying.Carrying([(linear, one, linear.weight_scale.min())]).balance()


def run(linear: nn.Linear, low_rank: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of the input and the factors."""
    x = inputs()
    out = linear.forward(x) if low_rank is None else linear.forward(x, low_rank=low_rank)
    torch.manual_seed(3)
    leaves = (x, *(low_rank or ()))
    return out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))


def test_a_wide_product_that_carries_is_the_sum_of_both():
    for got, wanted in zip(run(layer(None), factors()), run(layer(None, room=False), factors()), strict=True):
        assert difference(got, wanted) < 1e-5


@pytest.mark.parametrize("up", [1e-5, 1e-3, 1e-1, 1.0])
@pytest.mark.parametrize("down", [1e-2, 1.0])
def test_two_numbers_of_8_bits_are_as_good_as_bfloat16_at_any_size(down, up):
    """What lies behind the columns of both factors is the low-rank product, for forward and backward."""
    first, second = (factor.detach() for factor in factors(down, up))
    linear = layer("fp8")
    set_balance(linear, first, second)
    x, scale = inputs().detach().flatten(0, 1), linear.weight_scale
    grad = torch.randn(TOKENS, OUTER)
    for rows, weights, divisor, one, other, balance in (
        (x, None, scale, first.T, second, linear.balance[:1]),
        (grad, scale, None, second, first.T, linear.balance[1:]),
    ):
        hidden, more = rows @ one, carried.columns(RANK, frozen.FP8)
        made, by_row = carried.rows(rows, weights, hidden, more, balance)
        beside = torch.zeros(other.shape[0], more).to(frozen.FP8)
        carried.fill(beside, other, divisor, balance)
        product = (made[:, -more:].float() * by_row) @ beside.float().T
        assert difference(product if divisor is None else product * divisor, hidden @ other.T) < 0.004


@pytest.mark.parametrize("keep_transposed", [True, False])
@pytest.mark.parametrize("up", [1e-3, 1e-2, 1.0])
def test_an_fp8_product_that_carries_is_the_sum_of_both(up, keep_transposed):
    low_rank = factors(up=up)
    linear = layer("fp8", keep_transposed=keep_transposed)
    set_balance(linear, *low_rank)
    # A large product changes the scales that the rest is rounded with.
    tolerance = 1e-4 if up < 1e-2 else 0.03
    wanted = run(layer("fp8", room=False), low_rank)
    for got, expected in zip(run(linear, low_rank), wanted, strict=True):
        assert difference(got, expected) < tolerance


def test_a_product_larger_than_the_rest_stays_in_range():
    low_rank = factors(30.0, 30.0)
    linear = layer("fp8")
    set_balance(linear, *low_rank)
    wanted = run(layer("fp8", room=False), low_rank)
    for got, expected in zip(run(linear, low_rank), wanted, strict=True):
        assert torch.isfinite(got).all()
        assert difference(got, expected) < 0.01


def test_new_up_factors_are_zero_and_change_nothing():
    low_rank = factors(up=0.0)
    linear = layer("fp8")
    set_balance(linear, *low_rank)
    out, grad_x, _, grad_up = run(linear, low_rank)
    base, base_grad = run(layer("fp8"), None)
    torch.testing.assert_close(out, base)
    torch.testing.assert_close(grad_x, base_grad)
    assert float(grad_up.abs().max()) > 0


@pytest.mark.parametrize("kind", [None, "fp8"])
def test_room_is_written_before_each_use(kind):
    """Two uses of a layer with different factors, both before their backward passes."""
    linear, alone = layer(kind), layer(kind)
    first, second = factors(), factors(0.5, -2.0)
    for one in (linear, alone):
        if kind is not None:
            set_balance(one, *second)
    x = [inputs() for _ in range(4)]
    both = [linear.forward(x[i], low_rank=low_rank) for i, low_rank in enumerate((first, second))]
    for out in both:
        out.sum().backward()
    for i, low_rank in enumerate((first, second)):
        expected = alone.forward(x[i + 2], low_rank=[factor.detach() for factor in low_rank])
        torch.testing.assert_close(both[i], expected)
        expected.sum().backward()
        torch.testing.assert_close(x[i].grad, x[i + 2].grad)


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
    set_balance(linear, *low_rank)
    out, base = run(linear, low_rank)[0], run(linear, None)[0]
    wanted = (inputs() @ low_rank[0].T @ low_rank[1].T)[..., :5]
    assert difference((out - base)[..., :5], wanted) < 0.01


def test_the_operators_hold_torchs_contract():
    for kind in (None, "fp8"):
        linear, (down, up) = layer(kind), (factor.detach() for factor in factors())
        x = inputs().detach().flatten(0, 1)
        scale, balance = (None, None) if kind is None else (linear.weight_scale, linear.balance)
        first = (x, linear.room, scale, linear.bias, down, up, balance)
        operators.opcheck(torch.ops.polyrank.carried, first, test_utils=("test_faketensor",))
        out, hidden = torch.ops.polyrank.carried(*first)
        room = linear.room if kind is None else linear.weight_transposed
        operators.opcheck(
            torch.ops.polyrank.carried_backward,
            (torch.randn_like(out), room, scale, x, hidden, down, up, balance),
            test_utils=("test_faketensor",),
        )


def test_columns_keep_rows_aligned():
    for dtype, rank, wanted in (
        (frozen.FP8, 16, 128), (frozen.FP8, 43, 256), (torch.bfloat16, 16, 64), (torch.bfloat16, 65, 128),
    ):  # fmt: skip
        assert carried.columns(rank, dtype) == wanted


def applied(network_args: tuple[str, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    transformer = random_flux(flux_params(depth=1, singles=1))
    for linear in block_linears(transformer):
        frozen.store_scaled(linear, "fp8", keep_transposed=True)
        frozen.install_joining(linear)
    config = NetworkConfig(network_module="networks.lora_flux", network_dim=4, network_args=network_args)
    network = create(config, text_encoders=[], transformer=transformer)
    network.apply()
    transformer.network = network.module
    return transformer


@pytest.mark.parametrize("arguments", [(), ("split_qkv=True",)])
def test_a_model_carries_what_its_adapter_adds(arguments):
    model, reference = applied(arguments), applied(arguments)
    for one in (model, reference):
        torch.manual_seed(5)
        with torch.no_grad():
            for name, parameter in one.network.named_parameters():
                if "lora_up" in name:
                    parameter.normal_(std=0.02)
    model.carrying = carrying.carry(block_linears(model), dtype=torch.float32)
    assert model.carrying is not None
    assert all(linear.room is not None for linear in block_linears(model))
    results = []
    for one in (model, reference):
        out = one(**flux_inputs(flux_params(depth=1, singles=1)))
        out.square().mean().backward()
        results.append((out, {name: p.grad for name, p in one.network.named_parameters()}))
    (out, grads), (wanted, wanted_grads) = results
    assert difference(out, wanted) < 0.01
    for name, grad in grads.items():
        assert difference(grad, wanted_grads[name]) < 0.03, name


def test_what_comes_between_the_factors_is_not_carried():
    model = applied()
    for module in model.network.modules():
        if hasattr(module, "dropouts"):
            module.dropouts = type(module.dropouts)(rank=0.1)
    assert carrying.carry(block_linears(model), dtype=torch.float32) is None
    assert not any(hasattr(linear, "room") for linear in block_linears(model))
