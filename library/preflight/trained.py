"""What is trained: modules, parameters by group, the size of its files, found by building it without base weights."""

from __future__ import annotations

import importlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import nn

from library.config.train_config import TrainConfig
from library.errors import UserError
from library.files.safetensors import SAVE_DTYPES
from library.models.block_swap import check_travellers
from library.models.flux import Flux
from library.models.params import ClipParams, FluxParams, T5Params
from library.models.precision import store_blocks_in_fp8
from library.models.text_encoders import ClipL, T5Encoder
from library.optim import factory
from library.preflight.facts import GroupFacts, TrainedFacts
from library.train.prepare import ModelFiles, trains_text
from networks import lycoris_fit
from networks.interface import NetworkHandle, ParameterGroup, create

# Beginnings of module names in a network, by the model they belong to: Kohya's names and LyCORIS's.
_PARTS = (("lora_unet", "the transformer"), ("lora_te1", "CLIP-L"), ("lora_te2", "T5"), ("lora_te3", "T5"))
_USUAL_STATE = 8  # bytes a parameter: two float32 moments


def measure(config: TrainConfig, files: ModelFiles) -> TrainedFacts:
    """Build the network over models without memory and count. No model file is read beyond its header."""
    with _without_memory(config.network.network_module or ""):
        transformer = Flux(cast(FluxParams, files.parts["flux"].params())).requires_grad_(False)
        encoders: list[nn.Module] = []
        if trains_text(config):
            encoders.append(ClipL(cast(ClipParams, files.parts["clip_l"].params())))
            if not config.caching.cache_text_encoder_outputs:
                encoders.append(T5Encoder(cast(T5Params, files.parts["t5xxl"].params())))
    if config.memory.fp8_base:
        store_blocks_in_fp8(transformer)  # some networks refuse 8 bits: now, not when all is loaded
    with torch.random.fork_rng(devices=()):  # it draws initial weights
        network = create(config.network, text_encoders=encoders, transformer=transformer)
    base_parameters = sum(p.numel() for p in transformer.parameters())  # algo=full takes them off
    network.apply()
    if config.memory.blocks_to_swap:
        check_travellers(transformer.blocks)
    groups = network.parameter_groups(
        learning_rate=config.optimizer.learning_rate,
        unet_lr=config.optimizer.unet_lr,
        text_encoder_lr=config.optimizer.text_encoder_lr,
    )
    tensors = (*network.module.parameters(), *network.module.buffers())
    numbers = sum(tensor.numel() for tensor in tensors)
    kept = torch.bfloat16 if config.training.full_bf16 else torch.float32
    saved = SAVE_DTYPES[config.saving.save_precision] or kept
    writes_states = config.saving.save_state or config.saving.save_state_on_train_end
    # The average of what is trained is float32 whatever the rest is.
    trained = sum(p.numel() for group in groups for p in group.params)
    averaged = trained * torch.float32.itemsize if config.averaging.ema_decay is not None else 0
    return TrainedFacts(
        modules=_modules(network),
        groups=tuple(
            GroupFacts(group.name, group.lr, sum(p.numel() for p in group.params)) for group in groups
        ),
        base_parameters=base_parameters,
        network_bytes=numbers * saved.itemsize,
        # torch takes a second to make its first optimizer, so only where it matters.
        state_bytes=(
            numbers * kept.itemsize + averaged + optimizer_bytes(config, groups, kept) if writes_states else 0
        ),
    )


def _without_memory(network_module: str) -> AbstractContextManager[object]:
    """Where tensors made have no numbers.

    Fake tensors where the meta device will not do: LyCORIS copies base weights while it makes DoRA and algo=full. They
    take torch a second to import, which other networks need not wait for.
    """
    if not network_module.startswith(lycoris_fit.PACKAGE):
        return torch.device("meta")
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    mode: AbstractContextManager[object] = fake.FakeTensorMode(allow_non_fake_inputs=True)
    return mode


def optimizer_bytes(config: TrainConfig, groups: Sequence[ParameterGroup], dtype: torch.dtype) -> int:
    """Bytes that the optimizer remembers: one step is taken with one parameter of each shape.

    An optimizer that needs a GPU is not tried on the CPU; it counts as two float32 a parameter.
    """
    shapes = Counter(tuple(parameter.shape) for group in groups for parameter in group.params)
    total = sum(parameter.numel() for group in groups for parameter in group.params)
    probes = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    rate = config.optimizer.learning_rate or 1.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a GPU that is not asked for here
            built = factory.build(config.optimizer, [ParameterGroup("probe", tuple(probes), rate)])
            for probe in probes:
                probe.grad = torch.full_like(probe, 1e-3)
            built.optimizer.step()
    except UserError:
        raise
    except Exception:  # noqa: BLE001 - a foreign optimizer may need a GPU and fail in any way without one
        return total * _USUAL_STATE
    return sum(
        count * sum(tensor.numel() * tensor.itemsize for tensor in _tensors(built.optimizer.state[probe]))
        for probe, count in zip(probes, shapes.values(), strict=True)
    )


def _tensors(state: Mapping[str, object]) -> Iterator[torch.Tensor]:
    """What an optimizer keeps for one parameter, also in nested tables."""
    for value in state.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value)


def _modules(network: NetworkHandle) -> tuple[tuple[str, int], ...]:
    """How many layers of each model the network adds to."""
    counts = Counter[str]()
    for name, module in network.module.named_children():
        if any(True for _ in module.parameters()):
            part = next((part for prefix, part in _PARTS if name.startswith(prefix)), "other")
            counts[part] += 1
    return tuple(counts.items())
