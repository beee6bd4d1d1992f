"""Recorded micro-steps: when they are wanted, what tells shapes apart, when recording is left or given up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from library.adapters.base import Conditions, StepInputs
from library.config.train_config import TrainConfig
from library.data.records import TextCond, TokenIds
from library.errors import ConfigError
from library.flow.objective import Draw
from library.train import graphs
from library.train.graphs import ORDINARY, StepGraphs
from library.train.setup import batches, connected
from tools.bench_data import SIZES
from tools.bench_train import assemble, parse

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def steady(section: str = "", **changes: object) -> TrainConfig:
    """Options under which a step can be recorded, with some of one section changed."""
    plain = TrainConfig()
    config = replace(
        plain,
        caching=replace(plain.caching, cache_text_encoder_outputs=True),
        network=replace(plain.network, network_module="networks.lora_flux", network_train_unet_only=True),
    )
    return replace(config, **{section: replace(getattr(config, section), **changes)}) if section else config


OBSTACLES: dict[str, tuple[str, dict[str, object]]] = {
    "DeepSpeed": ("distributed", {"deepspeed": True}),
    "mixed_precision fp16": ("training", {"mixed_precision": "fp16"}),
    "blocks_to_swap": ("memory", {"blocks_to_swap": 2}),
    "cpu_offload_checkpointing": ("memory", {"cpu_offload_checkpointing": True}),
    "text encoders that run": ("caching", {"cache_text_encoder_outputs": False}),
    "network_train_unet_only": ("network", {"network_train_unet_only": False}),
    "dropouts": ("network", {"network_dropout": 0.1}),
    "a network with dropouts": ("network", {"network_args": ["module_dropout=0.1"]}),
    "GGPO": ("network", {"network_args": ["ggpo_sigma=0.03"]}),
    "not known here": ("network", {"network_module": "somebodys.network"}),
}


@pytest.mark.parametrize("named", OBSTACLES)
def test_each_obstacle_is_named_and_keeps_steps_from_being_recorded(named: str):
    section, changes = OBSTACLES[named]
    config = steady(section, **changes)
    assert named in (graphs.obstacle(config) or "")
    graphs.check(config)
    assert not graphs.wanted(config, device=CUDA, compiled=True)
    insisted = replace(config, memory=replace(config.memory, cuda_graphs="on"))
    with pytest.raises(ConfigError, match=r"cuda_graphs on does not go with .*: use cuda_graphs auto or off"):
        graphs.check(insisted)


@pytest.mark.parametrize(
    ("choice", "device", "compiled", "expected"),
    [
        ("auto", CUDA, True, True),
        ("auto", CUDA, False, False),
        ("on", CUDA, False, True),
        ("off", CUDA, True, False),
        ("on", CPU, True, False),
    ],
)
def test_steps_are_recorded_on_a_gpu_where_blocks_are_compiled_or_where_asked(
    choice: str, device: torch.device, compiled: bool, expected: bool
):
    for module in ("networks.lora_flux", "networks.oft_flux", "lycoris.kohya"):
        config = steady("memory", cuda_graphs=choice)
        config = replace(config, network=replace(config.network, network_module=module))
        graphs.check(config)
        assert graphs.obstacle(config) is None
        assert graphs.wanted(config, device=device, compiled=compiled) is expected


def arguments(
    *, height: int = 4, mask: bool = False, padded: bool = True, batch: int = 2
) -> tuple[Draw, StepInputs]:
    """A micro-step's, all of whose tensors differ."""
    latents = torch.randn(batch, 16, height, 4)
    draw = Draw(torch.randn_like(latents), torch.rand(batch), torch.randn_like(latents), latents + 1)
    text = TextCond(torch.randn(batch, 8), torch.randn(batch, 5, 8), torch.ones(batch, 5, dtype=torch.int64))
    weights = torch.rand(batch)
    seen = torch.rand(batch, 1, 8 * height, 32) if mask else None
    return draw, StepInputs(latents, Conditions(text, None, padded), seen, weights)


def test_a_shape_is_all_but_the_numbers():
    shape = graphs.shape_of(arguments())
    assert hash(shape) == hash(graphs.shape_of(arguments()))
    assert shape == graphs.shape_of(arguments())
    others = [{"height": 6}, {"mask": True}, {"padded": False}, {"batch": 1}]
    shapes = {shape, *(graphs.shape_of(arguments(**changes)) for changes in others)}
    assert len(shapes) == 1 + len(others)
    draw, inputs = arguments()
    assert graphs.shape_of((replace(draw, t=draw.t.double()), inputs)) not in shapes
    across = draw.noise.mT.contiguous().mT  # the same numbers in another order of memory
    assert graphs.shape_of((replace(draw, noise=across), inputs)) not in shapes
    tokens = TokenIds(*(torch.ones(2, 5, dtype=torch.int64) for _ in range(3)))
    live = replace(inputs, cond=Conditions(None, tokens))
    assert graphs.shape_of((draw, live)) not in shapes


def test_a_copy_has_tensors_of_its_own_and_the_same_shape():
    draw, inputs = arguments(mask=True, padded=False)
    copied, other = graphs._map(torch.clone, (draw, inputs))
    assert graphs.shape_of((copied, other)) == graphs.shape_of((draw, inputs))
    assert other.cond.has_padding is False
    assert other.cond.tokens is None
    pairs = list(
        zip(graphs._tensors((draw, inputs)), graphs._tensors((copied, other)), strict=True)
    )  # every tensor once: four of the draw, latents, three of the text, mask, weights
    assert len(pairs) == 10
    assert all(torch.equal(one, copy) and one.data_ptr() != copy.data_ptr() for one, copy in pairs)


@pytest.fixture
def device_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA, where there may be none; recording raises, as it does for a step it cannot record."""
    calls: list[str] = []

    def said(name: str, answer: object = None) -> Callable[..., object]:
        return lambda *_, **__: calls.append(name) or answer

    @contextmanager
    def refuse(*_: object, **__: object):
        calls.append("graph")
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    for name, answer in {
        "CUDAGraph": object(), "graph_pool_handle": (0, 1), "synchronize": None, "empty_cache": None,
        "memory_reserved": 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, said(name, answer))
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    return calls


class Line:
    """Something trained, w, and a step whose gradient is the sum of its inputs."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(3))
        self.weight.grad = self.kept = torch.zeros(3)
        self.graphs = StepGraphs([self.weight], shapes=2)
        self.calls = 0

    def step(self, x: Tensor) -> Tensor:
        self.calls += 1
        loss = (self.weight * x).sum(dim=1)  # [B]
        loss.sum().backward()
        return loss.detach()


def test_two_micro_steps_of_a_shape_are_ordinary(device_calls: list[str]):
    line = Line()
    for rows in (1, 2, 3):
        for _ in range(ORDINARY):
            assert torch.equal(line.graphs.run(line.step, torch.ones(rows, 3)), torch.full((rows,), 3.0))
    assert device_calls == []
    assert line.calls == 3 * ORDINARY
    assert torch.equal(line.kept, torch.full((3,), float(ORDINARY * (1 + 2 + 3))))
    assert line.weight.grad is line.kept


def test_a_step_that_cannot_be_recorded_is_made_all_the_same_and_no_other_is_tried(
    device_calls: list[str], our_warnings: list[str]
):
    line = Line()
    for number in range(ORDINARY + 4):
        out = line.graphs.run(line.step, torch.full((1, 3), float(number)))
        assert torch.equal(out, torch.tensor([3.0 * number]))
        # Nothing of the attempt is in the gradient, which is where it was.
        assert line.weight.grad is line.kept
        assert torch.equal(line.kept, torch.full((3,), float(sum(range(number + 1)))))
        assert device_calls.count("graph") == (number >= ORDINARY)
    assert our_warnings == [
        "cuda_graphs: a step cannot be recorded (RuntimeError: operation not permitted when stream is capturing), "
        "so steps are launched kernel by kernel"
    ]


def test_too_little_memory_beside_what_is_recorded_gives_it_up(
    device_calls: list[str], our_warnings: list[str], monkeypatch: pytest.MonkeyPatch
):
    @contextmanager
    def record(*_: object, **__: object):
        yield

    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (graphs.RESERVE - 1, 80 << 30))
    line = Line()
    for _ in range(ORDINARY + 2):
        line.graphs.run(line.step, torch.ones(1, 3))
    assert torch.equal(line.kept, torch.full((3,), ORDINARY + 2.0))
    assert device_calls.count("CUDAGraph") == 1
    assert [said.partition(",")[0] for said in our_warnings] == ["cuda_graphs: recorded steps hold 0.0 GB"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_is_the_ordinary_one_bit_for_bit():
    """Two micro-batches a step, of two buckets in turn."""

    def trained(choice: str) -> tuple[list[float], list[Tensor], int]:
        own, config = parse([
            "--size", "tiny", "--resolutions", "64x64,96x64", "--seed", "1", "--train_batch_size", "2",
            "--gradient_accumulation_steps", "2", "--learning_rate", "1e-2", "--compile_blocks", "off",
            "--attention", "math", "--cuda_graphs", choice,
        ])  # fmt: skip
        with connected(config) as backend:
            job, _, trainer = assemble(config, backend, SIZES[own.size], own.resolutions)
            assert trainer.limits.micro_steps == 2
            stream = batches(job)
            losses = [trainer.optimizer_step(stream)[0].loss for _ in range(12)]
            recorded = 0 if trainer.graphs is None else len(trainer.graphs._recorded)
            return losses, [parameter.detach().clone() for parameter in trainer.parameters], recorded

    losses, weights, recorded = trained("on")
    ordinary_losses, ordinary_weights, none = trained("off")
    assert (recorded, none) == (2, 0)
    assert losses == ordinary_losses
    assert all(torch.equal(one, other) for one, other in zip(weights, ordinary_weights, strict=True))
    assert len({tuple(weight.shape) for weight in weights}) > 1
