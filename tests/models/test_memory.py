"""Blocks that travel and activations that wait: same numbers, and no more on the device than promised."""

from __future__ import annotations

import json

import pytest
import torch
from model_examples import flux_inputs, flux_params, random_flux
from torch import nn

from library.config.sections.network import NetworkConfig
from library.errors import ConfigError
from library.models import frozen
from library.models.activation_checkpoint import Recomputation, SavedOnHost
from library.models.block_swap import PLACES, BlockSwap, SwapPlan, largest_swap
from library.models.flux import Flux
from library.models.load import Placement
from library.models.params import FluxParams
from library.models.precision import block_weights, is_modulation_weight, store_blocks_in_fp8
from networks.interface import NetworkHandle, create
from tools.bench_swap import main

PARAMS = flux_params(depth=5, singles=8)  # allows at most 6: 3 double and 6 single blocks off the device
MOST = 6
ADAPTERS = {
    "lora": NetworkConfig(network_module="networks.lora_flux", network_dim=2, network_train_unet_only=True),
    "lokr": NetworkConfig(
        network_module="lycoris.kohya", network_dim=2, network_args=("algo=lokr", "factor=4"),
        network_train_unet_only=True,
    ),
    "dora": NetworkConfig(
        network_module="lycoris.kohya", network_dim=2, network_args=("algo=lora", "dora_wd=True"),
        network_train_unet_only=True,
    ),
    "oft": NetworkConfig(
        network_module="networks.oft_flux", network_dim=4, network_alpha=1e-3, network_train_unet_only=True
    ),
}  # fmt: skip


def trained(adapter: str = "lora", *, fp8: bool = False, few: bool = False) -> tuple[Flux, NetworkHandle]:
    """A frozen model with an adapter that does something, in train mode; the same one every time."""
    model = random_flux(PARAMS).requires_grad_(False).train()
    if fp8:
        store_blocks_in_fp8(model)
    for name, linear in block_weights(model).items() if few else ():
        if is_modulation_weight(name):
            frozen.store_grouped(linear)
            frozen.install_joining(linear)
    torch.manual_seed(0)
    network = create(ADAPTERS[adapter], text_encoders=[], transformer=model)
    network.apply()
    network.parameter_groups(learning_rate=1.0, unet_lr=None, text_encoder_lr=None)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, network


def gradients(model: Flux, network: NetworkHandle, *, steps: int = 1) -> list[torch.Tensor]:
    """The outputs, then the summed gradients of every trained parameter."""
    inputs = flux_inputs(PARAMS)
    outputs = []
    for step in range(steps):
        out = model(**{**inputs, "img": inputs["img"] * (1 + step)})
        out.square().mean().backward()
        outputs.append(out.detach())
    grads = [p.grad for p in network.module.parameters() if p.requires_grad]
    assert all(grad is not None for grad in grads)
    return [*outputs, *grads]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Watch:
    """Sees every block begin: its weights must be there, and no more blocks than the plan says."""

    def __init__(self, model: Flux, swap: BlockSwap, away: tuple[int, int]) -> None:
        self.begun: list[int] = []
        self._model, self._swap = model, swap
        blocks = (*model.double_blocks, *model.single_blocks)
        self._own = [[m.weight.data_ptr() for m in b.modules() if isinstance(m, nn.Linear)] for b in blocks]
        self._limits = (len(model.double_blocks) - away[0], len(model.single_blocks) - away[1])
        self._plan = {*swap.plan.double, *swap.plan.single}
        self._host = dict(enumerate(self._own))  # travelling blocks pointed to main memory when this was made
        self._hooks = [
            block.register_forward_pre_hook(lambda *_, number=number: self._look(number))
            for number, block in enumerate(blocks)
        ]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, number: int) -> None:
        self.begun.append(number)
        depth = len(self._model.double_blocks)
        held = self._swap.resident | ({*range(len(self._own))} - self._plan)
        assert number in held
        assert sum(n < depth for n in held) <= self._limits[0]
        assert sum(n >= depth for n in held) <= self._limits[1]
        block = (*self._model.double_blocks, *self._model.single_blocks)[number]
        now = [m.weight.data_ptr() for m in block.modules() if isinstance(m, nn.Linear)]
        assert (now != self._host[number]) == (number in self._plan), "it computes with a copy"


@pytest.mark.parametrize("blocks", [None, 0, 6, 13])
@pytest.mark.parametrize("swapped", [1, 3, MOST])
def test_swapping_changes_no_output_and_no_gradient(swapped, blocks):
    """With every, no, some or all-by-number blocks recomputed; two micro-steps, validation between."""
    reference = gradients(*trained(), steps=2)
    model, network = trained()
    if blocks != 0:
        model.enable_gradient_checkpointing(blocks=blocks)
    swap = model.enable_block_swap(swapped)
    watch = Watch(model, swap, (swapped // 2, 2 * (swapped - swapped // 2)))
    assert equal(gradients(model, network, steps=2), reference)
    passes = 2 if blocks == 0 else 4
    assert len(watch.begun) == passes * 13 if blocks != 6 else len(watch.begun) == 2 * (13 + 6)
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(**flux_inputs(PARAMS)), reference[0])
    model.train()
    for parameter in network.module.parameters():
        parameter.grad = None
    assert equal(gradients(model, network, steps=2), reference)
    watch.stop()
    model.disable_block_swap()
    for parameter in network.module.parameters():
        parameter.grad = None
    assert equal(gradients(model, network, steps=2), reference)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    ("adapter", "stored"),
    [
        ("lokr", {}),
        ("dora", {}),
        ("oft", {}),
        ("lora", {"fp8": True}),
        ("lokr", {"fp8": True}),
        ("lora", {"few": True}),
        ("lokr", {"few": True}),
    ],
)
def test_other_adapters_and_8_bit_weights_swap_too(adapter, stored, recompute):
    def run(swapped: int) -> list[torch.Tensor]:
        model, network = trained(adapter, **stored)
        if recompute:
            model.enable_gradient_checkpointing()
        if swapped:
            model.enable_block_swap(swapped)
        return gradients(model, network)

    assert equal(run(MOST), run(0))


def test_autograd_keeps_no_weight_of_a_block_that_travels():
    """Without recomputation a place would else be held, or read when another block is in it."""
    model, network = trained()
    swap = model.enable_block_swap(MOST)
    reference = gradients(*trained())
    out = model(**flux_inputs(PARAMS))
    for lane in swap.lanes:
        assert len(lane._places) == PLACES
        for number, place in lane._places.items():  # what is in a place now must not matter
            place.fill_(255)  # NaN in float32
            lane.blocks[number].use(lane.blocks[number].host)
        lane._free, lane._places = [*lane._free, *lane._places.values()], {}
    out.square().mean().backward()
    grads = [p.grad for p in network.module.parameters()]
    assert equal(grads, reference[1:])


def test_two_forward_passes_may_come_before_their_backward_passes():
    def run(model: Flux, network: NetworkHandle) -> list[torch.Tensor]:
        first, second = (model(**flux_inputs(PARAMS, batch=size)).square().mean() for size in (1, 2))
        first.backward()
        second.backward()
        return [p.grad for p in network.module.parameters()]

    for blocks in (0, None, 6):
        model, network = trained()
        if blocks != 0:
            model.enable_gradient_checkpointing(blocks=blocks, offload_inputs=True)
        model.enable_block_swap(4)
        assert equal(run(model, network), run(*trained()))


def test_each_weight_is_sent_for_once_a_pass(monkeypatch):
    """Copies cost time: per pass no more than the blocks that are off the device, sampling included."""
    model, network = trained()
    model.enable_gradient_checkpointing()
    swap = model.enable_block_swap(MOST)
    sent: list[int] = []
    for lane in swap.lanes:
        for number, block in lane.blocks.items():
            original = block.copy_to

            def copy_to(place, number=number, original=original):
                sent.append(number)
                original(place)

            monkeypatch.setattr(block, "copy_to", copy_to)
    away = 3 + 6
    gradients(model, network)
    assert len(sent) == 2 * away
    gradients(model, network)
    assert len(sent) == 4 * away
    sent.clear()
    with torch.no_grad():
        for _ in range(4):
            model(**flux_inputs(PARAMS))
    assert len(sent) <= 4 * (away + 2 * PLACES)


def test_readers_of_weights_find_them_wherever_they_are():
    model, network = trained()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.enable_block_swap(MOST)
    gradients(model, network)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_compiled_blocks_swap():
    reference = gradients(*trained())
    model, network = trained()
    model.enable_gradient_checkpointing(blocks=3)
    model.enable_block_swap(4)
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(backend="aot_eager")
    for ours, theirs in zip(gradients(model, network), reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "most"),
    [
        (FluxParams(), 35),
        (FluxParams(depth=8), 13),
        (FluxParams(depth=19, depth_single_blocks=10), 8),
        (FluxParams(depth=2, depth_single_blocks=4), 1),
        (FluxParams(depth=1, depth_single_blocks=1), 0),
        (PARAMS, MOST),
    ],
)
def test_limits_are_kohyas(params, most):
    assert largest_swap(params) == most
    plan = SwapPlan.of(params, most)
    assert len({*plan.double, *plan.single}) == len(plan.double) + len(plan.single)
    assert all(number < params.depth for number in plan.double)
    assert all(params.depth <= number < params.depth + params.depth_single_blocks for number in plan.single)
    with pytest.raises(ConfigError, match=f"give at most {most}"):
        SwapPlan.of(params, most + 1)


def test_large_inputs_of_recomputed_blocks_wait_in_main_memory():
    model, network = trained()
    reference = gradients(*trained())
    waiting = SavedOnHost(smallest=512)
    packed = 0

    def count(tensor):
        nonlocal packed
        kept = SavedOnHost._pack(waiting, tensor)
        packed += kept is not tensor
        return kept

    waiting._pack = count
    model.recomputation = Recomputation(None, waiting)
    assert equal(gradients(model, network), reference)
    # Two streams of each double block, one of each single block; the first block's depend on nothing trained.
    assert packed == 2 * 4 + 8


def test_saved_activations_wait_on_the_host_and_come_back():
    x = torch.randn(8, requires_grad=True)
    with SavedOnHost(smallest=0).hooks():
        y = (x.exp() * x.sin()).sum()
    y.backward()
    torch.testing.assert_close(x.grad, (x.exp() * (x.sin() + x.cos())).detach())


def test_the_benchmark_of_swapping_runs_and_finds_equal_gradients(tmp_path):
    file = tmp_path / "swap.json"
    assert main(["--small", "--blocks", "34", "40", "--steps", "1", "--json", str(file)]) == 1
    plain, offloaded, *failed = json.loads(file.read_text(encoding="utf-8"))["results"]
    for result, offload in ((plain, False), (offloaded, True)):
        assert (result["blocks_to_swap"], result["cpu_offload_checkpointing"]) == (34, offload)
        assert result["equal"]
        assert result["gradient_difference"] == 0
    assert all("give at most 35" in result["error"] for result in failed)
    assert len(failed) == 2


def test_waiting_weights_are_loaded_to_main_memory():
    plan = SwapPlan.of(PARAMS, 2)  # one double and two single blocks off the device
    place = Placement(torch.device("meta"), waits=lambda name: plan.covers(name, PARAMS.depth))
    names = [name for name, _ in Flux(PARAMS).named_parameters()]
    waiting = {name for name in names if place.device_of(name).type == "cpu"}
    assert {name.split(".")[0] for name in waiting} == {"double_blocks", "single_blocks"}
    assert {int(name.split(".")[1]) for name in waiting if name.startswith("double")} == set(plan.double)
    assert {5 + int(name.split(".")[1]) for name in waiting if name.startswith("single")} == set(plan.single)
    assert all(name.endswith("weight") for name in waiting)
    assert len(waiting) == 10 * len(plan.double) + 3 * len(plan.single)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("blocks", [None, 0, 6])
def test_streams_on_a_gpu_change_no_gradient(blocks):
    """Many steps without a wait, so that a copy which came too late or too early would be seen."""

    def run(swapped: int) -> list[torch.Tensor]:
        model, network = trained()
        model.cuda()
        network.module.cuda()
        if swapped:
            model.enable_block_swap(swapped)
            if blocks != 0:
                model.recomputation = Recomputation(blocks, SavedOnHost(smallest=512))
        inputs = {name: tensor.cuda() for name, tensor in flux_inputs(PARAMS, grid=(32, 32)).items()}
        for step in range(10):
            model(**{**inputs, "img": inputs["img"] * (1 + step)}).square().mean().backward()
            with torch.no_grad():
                model(**inputs)
        return [p.grad for p in network.module.parameters() if p.requires_grad]

    for ours, theirs in zip(run(MOST), run(0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
