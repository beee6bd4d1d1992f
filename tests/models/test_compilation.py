"""Compiled blocks: how often something is compiled, the same numbers, and what happens where it fails."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from model_examples import flux_inputs, flux_params, random_flux
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.config.sections.network import NetworkConfig
from library.models import carrying, compilation, frozen
from library.models.activation_checkpoint import recompute_cheap
from library.models.compilation import STATIC_SHAPES
from library.models.precision import block_weights, is_modulation_weight
from networks.interface import create

PARAMS = flux_params(depth=2, singles=2)
LORA = NetworkConfig(network_module="networks.lora_flux", network_dim=2, network_train_unet_only=True)
LOKR = NetworkConfig(
    network_module="lycoris.kohya", network_dim=2, network_args=("algo=lokr", "factor=4"),
    network_train_unet_only=True,
)  # fmt: skip
LOHA = NetworkConfig(
    network_module="lycoris.kohya", network_dim=2, network_args=("algo=loha",), network_train_unet_only=True
)
EVERY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
LOKR_FULL = replace(LOKR, network_args=(*LOKR.network_args, "full_matrix=True"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_stop_signal_to_all_processes_leaves_those_that_compile():
    from torch._inductor import async_compile, config

    async_compile.shutdown_compile_workers()
    # Not by pytest's monkeypatch: it would delete the setting afterwards, as it is in no `__dict__`.
    with config.patch(compile_threads=2):
        compilation.start_workers()
        try:
            pool = async_compile.AsyncCompile.process_pool()
            (worker,) = {pool.submit(os.getpid).result(timeout=60)}
            for process in (pool.process.pid, worker):
                os.kill(process, signal.SIGTERM)
            assert pool.submit(max, 2, 3).result(timeout=60) == 3
            assert pool.process.poll() is None
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM}
        finally:
            async_compile.shutdown_compile_workers()
    assert pool.process.poll() == 0


def trained(config=LORA, *, joins=False, carries=False, scaled=None):
    model = random_flux(PARAMS).requires_grad_(False).train()
    for name, linear in block_weights(model).items():
        if scaled and is_modulation_weight(name):
            frozen.store_grouped(linear)
        elif scaled:
            frozen.store_scaled(linear, scaled, keep_transposed=False)
        if joins or carries:
            frozen.install_joining(linear)
    torch.manual_seed(0)
    network = create(config, text_encoders=[], transformer=model)
    network.apply()
    network.parameter_groups(learning_rate=1.0, unet_lr=None, text_encoder_lr=None)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if carries:
        model.before_forward = carrying.carry(block_weights(model).values(), dtype=torch.float32)
    return model, network


def gradients(model, network, inputs=None):
    network.module.zero_grad()
    out = model(**(inputs or flux_inputs(PARAMS)))
    out.square().mean().backward()
    return [out, *(p.grad.clone() for p in network.module.parameters() if p.grad is not None)]


def alike(one, other, tolerance=1e-5):
    assert len(one) == len(other) > 30
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "backend", "checkpointing"),
    [
        ({}, "eager", False),
        ({"joins": True}, "aot_eager", True),
        ({"scaled": "fp8", "joins": True}, "aot_eager", False),
        ({"carries": True}, "aot_eager", False),
        ({"scaled": "fp8", "carries": True}, "aot_eager", True),
        ({"scaled": "int8"}, "eager", True),
        ({"config": LOKR}, "eager", False),
        ({"config": LOHA}, "eager", False),
        ({"config": LOKR, "joins": True}, "aot_eager", True),
        ({"config": LOHA, "joins": True}, "aot_eager", False),
        ({"config": LOKR_FULL, "joins": True}, "aot_eager", True),
    ],
    ids=[
        "lora",
        "joined",
        "fp8",
        "carried",
        "carried fp8",
        "int8",
        "lokr",
        "loha",
        "lokr joined",
        "loha joined",
        "lokr full",
    ],
)
def test_one_compilation_a_class_and_the_same_gradients(options, backend, checkpointing):
    expected = gradients(*trained(**options))
    model, network = trained(**options)
    counter = CompileCounterWithBackend(backend)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.enable_compilation(backend=counter)
    alike(gradients(model, network), expected)
    alike(gradients(model, network), expected)
    assert counter.frame_count == 2, "no more than one graph for each class, no graph breaks"


@pytest.mark.parametrize(
    "options", [{"joins": True}, {"scaled": "fp8"}, {"carries": True}], ids=["joined", "fp8", "carried"]
)
def test_recomputing_what_is_cheap_repeats_no_attention_and_no_narrow_product(options):
    inputs = sized(10, 12)  # more tokens than what counts as few
    expected = gradients(*trained(**options), inputs)
    forward, backward = [], []

    def look(into):
        def compiler(graph, _inputs):
            into.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
            return make_boxed_func(graph.forward)

        return compiler

    model, network = trained(**options)
    model.enable_gradient_checkpointing(cheap_only=True)
    model.enable_compilation(
        backend=aot_autograd(
            fw_compiler=look(forward), bw_compiler=look(backward),
            partition_fn=min_cut_rematerialization_partition,
        )
    )  # fmt: skip
    alike(gradients(model, network, inputs), expected)
    assert sum("scaled_dot_product" in target for target in forward) == 2, "one for each class"
    assert sum("scaled_dot_product" in target and "backward" not in target for target in backward) == 0
    # Repeated are those that widen: qkv and MLP of the image (text is short here), and the single block's first.
    kind = "joined" if "joins" in options else "carried"
    if "scaled" not in options:
        assert forward.count(f"polyrank.{kind}.default") == 10 + 3
        assert backward.count(f"polyrank.{kind}.default") == 2 + 1
    else:  # the products of few rows are kept
        assert forward.count("polyrank.few_rows.default") == 2 + 1
        assert backward.count("polyrank.few_rows.default") == 0


def test_some_blocks_recompute_what_is_cheap_and_the_others_keep_all():
    inputs = sized(10, 12)
    expected = gradients(*trained(), inputs)
    model, network = trained()
    model.enable_gradient_checkpointing(cheap_only=True)
    counter = CompileCounterWithBackend("aot_eager")
    model.enable_compilation(backend=counter)
    for blocks, graphs in ((None, 2), (3, 3), (1, 4), (0, 4), (None, 4)):
        model.recompute_first(blocks)
        alike(gradients(model, network, inputs), expected)
        assert counter.frame_count == graphs, "each form of each class is compiled once"


@pytest.mark.parametrize("cheap", [None, True])
def test_blocks_that_travel_are_compiled_too(cheap):
    params = flux_params(depth=4, singles=6)
    models = []
    for swapped in (0, 2):
        model = random_flux(params).requires_grad_(False).train()
        torch.manual_seed(0)
        network = create(LORA, text_encoders=[], transformer=model)
        network.apply()
        network.parameter_groups(learning_rate=1.0, unet_lr=None, text_encoder_lr=None)
        if swapped:
            if cheap:
                model.enable_gradient_checkpointing(cheap_only=True)
            model.enable_block_swap(swapped)
        model.enable_compilation(backend="aot_eager")
        models.append(gradients(model, network, flux_inputs(params)))
    alike(*models)


def test_many_sizes_are_one_compilation():
    model, network = trained()
    plain, plain_network = trained()
    counter = CompileCounterWithBackend("eager")
    model.enable_compilation(backend=counter, shapes=STATIC_SHAPES + 1)
    for rows, columns in ((2, 3), (4, 4), (5, 2), (3, 6)):
        inputs = sized(rows, columns)
        alike(gradients(model, network, inputs), gradients(plain, plain_network, inputs))
    assert counter.frame_count == 2


def sized(rows, columns):
    inputs = flux_inputs(PARAMS)
    batch, tokens = inputs["img"].shape[0], rows * columns
    torch.manual_seed(rows * columns)
    axes = (torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
    ids = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    inputs["img"] = torch.randn(batch, tokens, inputs["img"].shape[2])
    inputs["img_ids"] = ids.view(1, tokens, 3).expand(batch, -1, -1)
    return inputs


def test_eval_mode_is_not_compiled():
    model, _ = trained()
    counter = CompileCounterWithBackend("eager")
    model.enable_compilation(backend=counter)
    model.eval()
    with torch.no_grad():
        model(**flux_inputs(PARAMS))
    assert counter.frame_count == 0


def test_a_second_start_finds_what_was_traced(monkeypatch, tmp_path):
    """Products are autograd functions of our own, which torch caches only when it is told to."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def gradient() -> torch.Tensor:
        linear = torch.nn.Linear(16, 32)
        torch.nn.init.ones_(linear.weight)
        frozen.install_joining(linear)
        factors = torch.ones(4, 16, requires_grad=True), torch.ones(32, 4)
        torch.compile(linear, dynamic=False)(torch.ones(2, 16), low_rank=factors).sum().backward()
        assert factors[0].grad is not None
        return factors[0].grad

    found, hits = [], []
    with torch.compiler.config.patch(cache_key_tag=""):
        for kernels in (EVERY, EVERY, [SDPBackend.MATH]):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            with sdpa_kernel(kernels):
                compilation.begin("inductor")
                found.append(gradient())
            hits.append(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 1, 0], "a kept graph holds the kernel of attention that it was traced with"
    assert torch.equal(found[0], found[1])


def test_a_second_start_finds_what_was_traced_to_be_recomputed(monkeypatch, tmp_path):
    kept = pytest.importorskip("torch._functorch._aot_autograd.autograd_cache")
    if not hasattr(kept, "_get_context_fn_cache_hash"):
        pytest.skip("this torch keeps nothing that is recomputed")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compilation.begin("inductor")
    hits = []
    for _ in range(2):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        block, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.SiLU()), torch.ones(2, 8)
        torch.compile(recompute_cheap, dynamic=False)(block, x.requires_grad_()).sum().backward()
        hits.append(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 1]


@pytest.mark.parametrize("failing", ["forward", "backward"])
def test_what_cannot_be_compiled_runs_as_it_is(failing, our_warnings):
    def broken(graph, inputs):
        raise NotImplementedError("no compiler on this machine\nand more lines")

    def whole(graph, inputs):
        return graph.forward

    backend = aot_autograd(
        fw_compiler=broken if failing == "forward" else whole,
        bw_compiler=broken if failing == "backward" else whole,
    )
    expected = gradients(*trained())
    model, network = trained()
    model.enable_compilation(backend=backend)
    alike(gradients(model, network), expected)
    (said,) = [text for text in our_warnings if "compiled" in text]
    assert "goes on without" in said
    assert "\n" not in said
