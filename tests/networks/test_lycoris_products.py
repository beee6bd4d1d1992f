"""LoHa and LoKr as small products: the library's own outputs and gradients, compiled or not, and nearer to exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from library.models import frozen
from networks import lycoris_products

IN, OUT = 96, 160
# Name: class, options, and what is asked of the layer's own product ("low rank") or added to it ("groups").
CASES = {
    "loha": (LohaModule, {"lora_dim": 4, "alpha": 2.0}, "low rank"),
    "loha_scalar": (LohaModule, {"lora_dim": 3, "use_scalar": True, "rs_lora": True}, "low rank"),
    "lokr": (LokrModule, {"lora_dim": 3, "alpha": 2.0, "factor": 4}, "low rank"),
    "lokr_scalar": (LokrModule, {"lora_dim": 2, "factor": 4, "use_scalar": True}, "low rank"),
    "lokr_narrow": (LokrModule, {"lora_dim": 1, "factor": 10}, "low rank"),  # w1 is [10, 8]
    "lokr_both": (LokrModule, {"lora_dim": 3, "factor": 8, "decompose_both": True}, "low rank"),
    "lokr_rs": (LokrModule, {"lora_dim": 3, "factor": 4, "rs_lora": True}, "low rank"),
    "lokr_ranks": (LokrModule, {"lora_dim": 6, "alpha": 3.0, "factor": 4}, "groups"),
    "lokr_even": (LokrModule, {"lora_dim": 4, "alpha": 2.0, "factor": -1}, "groups"),
    "lokr_both_ranks": (LokrModule, {"lora_dim": 4, "factor": 10, "decompose_both": True}, "groups"),
    "lokr_full": (LokrModule, {"full_matrix": True, "factor": 4}, "groups"),
    "lokr_full_scalar": (LokrModule, {"full_matrix": True, "factor": 4, "use_scalar": True}, "groups"),
    "lokr_full_even": (LokrModule, {"full_matrix": True, "factor": -1}, "groups"),
    "lokr_turned": (
        LokrModule, {"full_matrix": True, "factor": 4, "unbalanced_factorization": True}, "groups",
    ),
}  # fmt: skip


def layer(*, wide: int = OUT, joins: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(IN, wide).requires_grad_(False).to(dtype)
    if joins:
        frozen.install_joining(linear)
    return linear


def adapted(
    case: str, linear: nn.Linear, *, strength: float = 0.7, size: float = 0.3
) -> LohaModule | LokrModule:
    """A module of random numbers that computes by products where it can, not yet applied."""
    kind, options, _ = CASES[case]
    torch.manual_seed(1)
    module = kind("lora", linear, strength, bypass_mode=True, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * size)
    lycoris_products.install(module)
    return module


def results(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, and gradients of the input and of all that is trained."""
    x = x.clone().requires_grad_()
    out = call(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    inputs = [x, *module.parameters()]
    return [out, *torch.autograd.grad((out.to(weights.dtype) * weights).sum(), inputs)]


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(2))


def alike(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 0
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("wide", [OUT, IN // 2])
@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_the_librarys(case: str, joins: bool, wide: int) -> None:
    linear = layer(joins=joins, wide=wide)
    module = adapted(case, linear)
    x = tokens(2, 5)
    module.apply_to()
    assert "forward" in vars(module), "it is one of those that can"
    expected = results(module, lambda x: type(module).forward(module, x), x)
    alike(results(module, linear, x), expected)
    alike([linear(tokens())], [type(module).forward(module, tokens())])

    module.bypass_mode = False
    alike(results(module, linear, x), results(module, lambda x: type(module).forward(module, x), x))


@pytest.mark.parametrize("case", CASES)
def test_a_low_rank_goes_along_with_the_layers_own_product(case: str) -> None:
    linear = layer()
    own, given = linear.forward, []

    def forward(x: Tensor, low_rank: tuple[Tensor, Tensor] | None = None) -> Tensor:
        given.append(low_rank)
        return own(x)

    linear.forward = forward
    adapted(case, linear).apply_to()
    linear(tokens(3))
    assert (given[0] is not None) == (CASES[case][2] == "low rank")


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_compiled_it_is_one_graph_with_the_same_numbers(case: str, joins: bool) -> None:
    torch._dynamo.reset()
    linear = layer(joins=joins)
    module = adapted(case, linear)
    module.apply_to()
    x = tokens(2, 5)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=False)
    alike(results(module, compiled, x), results(module, linear, x))


@pytest.mark.parametrize("case", ["loha", "lokr", "lokr_full"])
def test_strength_zero_is_the_base_and_restoring_gives_the_layer_back(case: str) -> None:
    linear = layer(joins=True)
    x = tokens(2)
    before = linear(x)
    module = adapted(case, linear, strength=0.0)
    module.apply_to()
    with torch.no_grad():
        assert torch.equal(linear(x), before)
    torch.testing.assert_close(linear(x), before)
    module.multiplier = 1.0
    assert not torch.allclose(linear(x), before)
    module.restore()
    assert torch.equal(linear(x), before)


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.1},
        {"rank_dropout": 0.1},
        {"module_dropout": 0.1},
        {"weight_decompose": True},
        {"lora_dim": 32},
    ],
    ids=str,
)
def test_what_is_more_than_factors_stays_the_librarys(options: dict[str, object]) -> None:
    module = LohaModule("lora", layer(), **{"lora_dim": 4, **options})
    lycoris_products.install(module)
    assert not {"forward", "apply_to"} & vars(module).keys()


def test_a_convolution_stays_the_librarys() -> None:
    module = LokrModule("lora", nn.Conv2d(8, 8, 1), lora_dim=2, factor=2)
    lycoris_products.install(module)
    assert not {"forward", "apply_to"} & vars(module).keys()


@pytest.mark.parametrize("joins", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_in_16_bits_it_is_nearer_to_exact_than_the_library(case: str, joins: bool) -> None:
    """Nearer than its product beside the layer, and far nearer than its default, which adds to 16-bit weights."""
    exact_layer = layer(dtype=torch.float64)
    exact_module = adapted(case, exact_layer, size=0.02).double()
    exact_module.apply_to()
    linear = layer(joins=joins, dtype=torch.bfloat16)
    module = adapted(case, linear, size=0.02)
    module.apply_to()
    for silent in (exact_layer, linear):  # what remains is what is added
        silent.weight.data.zero_()
        silent.bias.data.zero_()
    x = tokens(64).bfloat16()
    exact = results(exact_module, lambda x: type(exact_module).forward(exact_module, x), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = results(module, linear, x)
        theirs = results(module, lambda x: type(module).forward(module, x), x)
        module.bypass_mode, linear.weight.data = False, layer(dtype=torch.bfloat16).weight
        module.org_forward = lambda x: x.new_zeros(*x.shape[:-1], OUT)
        rebuilt = results(module, lambda x: type(module).forward(module, x), x)
    for i in (0, 1):  # the output, and the gradient of the input
        assert error(mine[i], exact[i]) <= error(theirs[i], exact[i])
        assert error(mine[i], exact[i]) < 0.05 * error(rebuilt[i], exact[i])
    for own, found in zip(mine, exact, strict=True):
        assert found.numel() == 1 or error(own, found) < 0.007


def error(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).norm() / exact.norm()).detach())
