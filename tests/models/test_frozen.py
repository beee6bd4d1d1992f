"""Products with frozen weights: each way of storing and joining against plain float32 arithmetic."""

from __future__ import annotations

import pytest
import torch
from model_examples import difference, flux_inputs, flux_params, random_flux, wide_weight
from torch import library as operators
from torch import nn

from library.config.sections.network import NetworkConfig
from library.models import frozen, rounding
from library.models.precision import block_linears, store_blocks_in_fp8
from library.models.rounding import round_rows
from networks.interface import create
from networks.layers import Dropouts, LoRALinear
from networks.targets import Candidate, Target

PARAMS = flux_params(depth=2, singles=2)
TOKENS, INNER, OUTER, RANK = 40, 64, 48, 4


def layer(*, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(INNER, OUTER, bias=bias).requires_grad_(False)
    with torch.no_grad():
        made.weight.mul_(torch.logspace(-3, 1, OUTER)[:, None])  # rows of very different size
    return made


def inputs(dtype=torch.float32) -> torch.Tensor:
    torch.manual_seed(1)
    scale = torch.logspace(-2, 2, TOKENS)[:, None]
    return (torch.randn(TOKENS, INNER) * scale).to(dtype).view(2, -1, INNER).requires_grad_(True)


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(RANK, INNER, requires_grad=True), torch.randn(OUTER, RANK, requires_grad=True)


def by_row(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest distance of a row relative to that row's norm."""
    one, other = (tensor.detach().float().flatten(0, -2) for tensor in (one, other))
    return float(((one - other).norm(dim=1) / other.norm(dim=1)).max())


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joined_product_is_the_sum_of_both(dtype, narrow):
    linear = layer().to(dtype)
    if narrow:
        linear.weight = nn.Parameter(linear.weight.to(frozen.NARROW), requires_grad=False)
    wide = linear.weight.float()
    x, reference = inputs(dtype), inputs(dtype)
    (down, up), (plain_down, plain_up) = factors(), factors()
    frozen.install_joining(linear)
    out = linear.forward(x, low_rank=(down, up))
    expected = reference.float() @ (wide + plain_up @ plain_down).T + linear.bias.float()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert out.dtype == dtype
    assert by_row(out, expected) < tolerance
    direction = torch.randn_like(expected)
    out.backward(direction.to(dtype))
    expected.backward(direction)
    for got, wanted in ((x, reference), (down, plain_down), (up, plain_up)):
        assert difference(got.grad, wanted.grad) < tolerance


def test_joined_product_keeps_nothing_as_wide_as_its_output():
    kept = []
    linear = layer()
    frozen.install_joining(linear)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        linear.forward(inputs(), low_rank=factors())
    assert (TOKENS, OUTER) not in kept
    assert (TOKENS, RANK) in kept


def test_the_joined_operators_hold_torchs_contract():
    x, (down, up), linear = inputs().detach().flatten(0, 1), factors(), layer()
    down, up = down.detach(), up.detach()
    checks = ("test_schema", "test_faketensor")
    plain = (x, None, None, linear.weight, None, linear.bias, down, up)
    operators.opcheck(torch.ops.polyrank.joined, plain, test_utils=checks)
    out, hidden = torch.ops.polyrank.joined(*plain)
    grad, weight = torch.randn_like(out), linear.weight
    frozen.store_scaled(linear, "fp8", keep_transposed=False)
    scaled = (x, *round_rows(x, frozen.NARROW), linear.weight, linear.weight_scale, linear.bias, down, up)
    operators.opcheck(torch.ops.polyrank.joined, scaled, test_utils=checks[1:])  # the first multiplies 8 bits
    for needs in (True, False):
        for rounded in ((None, None, weight), (*round_rows(grad, frozen.NARROW), linear.weight)):
            operators.opcheck(
                torch.ops.polyrank.joined_backward,
                (grad, *rounded, x, hidden, down, up, needs),
                test_utils=checks[1:],
            )


def test_a_scaled_product_takes_the_adapter_along():
    (down, up), (plain_down, plain_up) = factors(), factors()
    linear, x, reference = layer(), inputs(), inputs()
    frozen.store_scaled(linear, "fp8", keep_transposed=True)
    frozen.install_joining(linear)
    out = linear.forward(x, low_rank=(down, up))
    base = linear.forward(reference)
    expected = base + (reference @ plain_down.T) @ plain_up.T
    assert by_row(out, expected) < 1e-5
    direction = torch.randn_like(expected)
    out.backward(direction)
    expected.backward(direction)
    for got, wanted in ((x, reference), (down, plain_down), (up, plain_up)):
        assert difference(got.grad, wanted.grad) < 1e-5


@pytest.mark.parametrize("keep_transposed", [False, True])
@pytest.mark.parametrize(("kind", "tolerance"), [("fp8", 0.1), ("int8", 0.03)])
def test_scaled_products_are_near_in_every_token(kind, tolerance, keep_transposed):
    """One scale a row and a token: rows and tokens 10^4 apart are all as near."""
    linear = layer()
    x, reference = inputs(), inputs()
    expected = nn.functional.linear(reference, linear.weight)
    bias = linear.bias.clone()
    frozen.store_scaled(linear, kind, keep_transposed=keep_transposed)
    assert linear.weight.dtype == frozen.SCALED_DTYPES[kind]
    assert by_row(wide_weight(linear), layer().weight) < tolerance
    out = linear(x) - bias
    assert by_row(out, expected) < tolerance
    direction = torch.randn_like(expected) * torch.logspace(-2, 2, 20)[:, None]
    out.backward(direction)
    expected.backward(direction)
    assert by_row(x.grad, reference.grad) < tolerance


def test_a_card_without_fp8_is_not_warned_of_a_kernel_that_it_has_no_use_for(monkeypatch):
    monkeypatch.setattr(rounding, "trusted", lambda name, check: "kernel")
    for capability, found in (((8, 6), None), ((8, 9), "kernel")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, own=capability: own)
        assert rounding._kernel.__wrapped__(torch.device("cuda")) == found


def test_scaled_products_are_exactly_those_of_the_rounded_numbers():
    linear = layer(bias=False)
    frozen.store_scaled(linear, "fp8", keep_transposed=False)
    x = torch.randn(TOKENS, INNER)
    scale = x.abs().amax(dim=1, keepdim=True) / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(linear(x), rounded @ wide_weight(linear).T, rtol=1e-5, atol=1e-5)


def test_a_weight_in_fp8_is_not_rounded_twice():
    linear = layer()
    linear.weight = nn.Parameter(linear.weight.to(frozen.NARROW), requires_grad=False)
    before = linear.weight.float()
    frozen.store_scaled(linear, "fp8", keep_transposed=False)
    normal = before.abs() >= 2**-6  # below lie numbers of fewer digits
    assert torch.equal(wide_weight(linear)[normal], before[normal])


def test_rows_and_tokens_of_zeros():
    linear = layer()
    with torch.no_grad():
        linear.weight[3] = 0
    frozen.store_scaled(linear, "int8", keep_transposed=False)
    out = linear(torch.zeros(2, INNER))
    assert torch.equal(out, linear.bias.expand(2, -1))


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_gradients_of_a_whole_model_point_the_same_way(kind):
    plain, scaled = (model_and_network() for _ in range(2))
    outs = []
    for model, network in (plain, scaled):
        if model is scaled[0]:
            for linear in block_linears(model):
                frozen.store_scaled(linear, kind, keep_transposed=False)
        network.apply()
        network.parameter_groups(learning_rate=1.0, unet_lr=None, text_encoder_lr=None)
        out = model(**flux_inputs(PARAMS))
        out.square().mean().backward()
        outs.append(out)
    assert difference(outs[1], outs[0]) < 0.1
    one, other = (
        torch.cat([p.grad.flatten() for p in network.module.parameters()]) for _, network in (plain, scaled)
    )
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


ARGUMENTS = {
    "plain": (),
    "split": ("split_qkv=True",),
    "rank dropout": ("rank_dropout=0.3",),
    "module dropout": ("module_dropout=0.3",),
    "ggpo": ("ggpo_sigma=0.1", "ggpo_beta=0.1"),
}


def model_and_network(*arguments: str, dropout: float | None = None):
    model = random_flux(PARAMS).requires_grad_(False).train()
    config = NetworkConfig(
        network_module="networks.lora_flux", network_dim=2, network_alpha=1.0, network_args=arguments,
        network_train_unet_only=True, network_dropout=dropout,
    )  # fmt: skip
    torch.manual_seed(0)
    network = create(config, text_encoders=[], transformer=model)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, network


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("option", ARGUMENTS)
def test_lora_is_the_same_network_where_the_layer_takes_it_along(option, eight_bits):
    results = []
    for joins in (False, True):
        model, network = model_and_network(*ARGUMENTS[option])
        if eight_bits:
            store_blocks_in_fp8(model)
        if joins:
            for linear in block_linears(model):
                frozen.install_joining(linear)
        network.apply()
        network.set_multiplier(0.7)
        network.parameter_groups(learning_rate=1.0, unet_lr=None, text_encoder_lr=None)
        torch.manual_seed(3)
        out = model(**flux_inputs(PARAMS))
        out.square().mean().backward()
        results.append([out, *(p.grad for p in network.module.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert sum(bool(grad.any()) for grad in results[0][1:]) > 10


def test_an_adapter_over_an_adapter_is_added_plainly():
    linear = layer()
    frozen.install_joining(linear)
    inner = linear.forward
    linear.forward = lambda x: inner(x) * 2
    model = nn.Module()
    model.layer = linear
    lora = LoRALinear(
        Target(candidate=Candidate(prefix="lora_unet", path="layer", linear=linear), rank=2, parts=()),
        alpha=2, dropouts=Dropouts(), multiplier=1.0,
    )  # fmt: skip
    with torch.no_grad():
        lora.lora_up.weight.fill_(0.1)
    lora.apply_to()
    x = inputs().detach()
    torch.testing.assert_close(linear(x), inner(x) * 2 + x @ lora.delta().T, rtol=1e-4, atol=1e-3)
