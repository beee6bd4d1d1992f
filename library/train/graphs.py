"""Micro-steps recorded as CUDA graphs: the GPU is handed thousands of kernels at once, and waits for none.

A step of FLUX is some four thousand kernels. Python launches them hardly faster than an H200 computes them, and slower
as soon as it is disturbed. What a micro-step does on the device depends on the shapes of its inputs only, so after
two ordinary ones of a shape the third is recorded and from then on replayed: the same kernels on the same addresses,
bit for bit. Inputs are copied to where they were, gradients stay in their place (library/distributed/gradients.py).

Recording is left out where the host decides something within a step (`obstacle`), and given up, with a line, where it
fails or leaves too little memory for what is not recorded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from library.config.sections.network import NetworkConfig
from library.config.train_config import TrainConfig
from library.errors import ConfigError

logger = logging.getLogger(__name__)

ORDINARY = 2  # micro-steps of a shape before it is recorded: kernels are compiled and chosen in them
MOST = 16  # shapes that are recorded; each costs a few dozen MB
RESERVE = 6 << 30  # bytes that validation, sample images and an autoencoder may want beside what is recorded

# Networks whose forward asks the host for nothing, chance apart.
_STEADY = ("networks.lora_flux", "networks.oft_flux", "lycoris.kohya")
_CHANCE = ("dropout", "ggpo_")


def obstacle(config: TrainConfig) -> str | None:
    """What micro-steps of this run cannot be recorded with; None if they can be."""
    memory, network = config.memory, config.network
    obstacles = {
        "DeepSpeed": config.distributed.uses_deepspeed,
        "mixed_precision fp16": config.training.mixed_precision == "fp16",
        "blocks_to_swap": bool(memory.blocks_to_swap),
        "cpu_offload_checkpointing": memory.cpu_offload_checkpointing,
        "text encoders that run in each step (cache_text_encoder_outputs, network_train_unet_only)": (
            not config.caching.cache_text_encoder_outputs or not network.network_train_unet_only
        ),
        "a network with dropouts or GGPO, or one that is not known here": has_chance(config.network),
    }
    return next((name for name, there in obstacles.items() if there), None)


def has_chance(network: NetworkConfig) -> bool:
    """Whether the network draws random numbers in a step, or changes with the gradients."""
    if network.network_module not in _STEADY:
        return True  # who knows
    names = (item.partition("=")[0] for item in network.network_args)
    return bool(network.network_dropout) or any(word in name for name in names for word in _CHANCE)


def check(config: TrainConfig) -> None:
    """Raises ConfigError where cuda_graphs on cannot be done, before anything is loaded."""
    against = obstacle(config)
    if config.memory.cuda_graphs == "on" and against is not None:
        raise ConfigError(f"cuda_graphs on does not go with {against}: use cuda_graphs auto or off")


def wanted(config: TrainConfig, *, device: torch.device, compiled: bool) -> bool:
    """Whether micro-steps are to be recorded. `auto`: those of compiled blocks."""
    choice = config.memory.cuda_graphs
    if choice == "off" or device.type != "cuda" or obstacle(config) is not None:
        return False
    return choice == "on" or compiled


def beside(held: int, *, other: float) -> int:
    """Bytes to leave free beside recorded steps that hold `held`.

    `other` is the size of steps that are not recorded yet, as a share of the recorded ones'.
    """
    return max(RESERVE, int(held * other))


class StepGraphs:
    """Recorded micro-steps, by the shapes of what goes in."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, shapes: int) -> None:
        """`parameters` is all that is trained; `shapes` how many sizes of inputs the run will see."""
        self._parameters = parameters
        self._several = shapes > 1
        self._seen: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, _Recorded] = {}
        self._addresses: tuple[int, ...] = ()
        self._pool: Any = None
        self._given_up = False

    def run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """`function(*arguments)`, a tensor without history; gradients are added to as the function does.

        The function may depend on nothing but tensors among the arguments (and other values that are part of the
        shape), the trained parameters and what never changes.
        """
        shape = shape_of(arguments)
        if self._recorded and self._addresses != self._where():
            self._forget()  # a parameter lies elsewhere now
        recorded = self._recorded.get(shape)
        if recorded is None:
            self._seen[shape] += 1
            if self._given_up or self._seen[shape] <= ORDINARY or len(self._recorded) == MOST:
                return function(*arguments)
            recorded = self._record(function, arguments)
            if recorded is None:
                return function(*arguments)
            self._recorded[shape] = recorded
        return recorded.replay(arguments)

    def _record(self, function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> _Recorded | None:
        inputs = _map(torch.clone, arguments)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        gradients = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None  # the recorded step makes them anew, which costs no kernel for each
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what ordinary steps held is needed for the recorded one
        before = torch.cuda.memory_reserved()
        try:
            # Other threads (loader, watchdog of the ranks) go on meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = function(*inputs)
        except RuntimeError as error:
            lines = str(error).strip().splitlines()
            self._give_up(f"a step cannot be recorded ({type(error).__name__}: {lines[0] if lines else ''})")
            return None
        finally:
            made = [parameter.grad for parameter in self._parameters]
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
        held = torch.cuda.memory_reserved() - before
        wanted = beside(held, other=float(self._several and not self._recorded))
        if torch.cuda.mem_get_info()[0] < wanted:
            del graph, output, made
            self._give_up(f"recorded steps hold {held / 1e9:.1f} GB, which leaves too little for others")
            return None
        logger.debug("cuda_graphs: recorded a step, %.1f GB", held / 1e9)
        self._addresses = self._where()
        pairs = [
            (sum_, one)
            for sum_, one in zip(gradients, made, strict=True)
            if sum_ is not None and one is not None
        ]
        return _Recorded(graph, inputs, output, [sum_ for sum_, _ in pairs], [one for _, one in pairs])

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self._forget()
        logger.warning("cuda_graphs: %s, so steps are launched kernel by kernel", reason)

    def _forget(self) -> None:
        self._recorded.clear()
        self._seen.clear()  # what lies elsewhere is looked up in ordinary steps first
        self._pool = None
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _where(self) -> tuple[int, ...]:
        gradients = (parameter.grad for parameter in self._parameters)
        return (
            *(parameter.data_ptr() for parameter in self._parameters),
            *(0 if gradient is None else gradient.data_ptr() for gradient in gradients),
        )


@dataclass(frozen=True, slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Any, ...]
    output: Tensor
    gradients: list[Tensor]  # of the optimizer step so far
    made: list[Tensor]  # by the recorded micro-step

    def replay(self, arguments: tuple[Any, ...]) -> Tensor:
        for place, tensor in zip(_tensors(self.inputs), _tensors(arguments), strict=True):
            place.copy_(tensor, non_blocking=True)
        self.graph.replay()
        torch._foreach_add_(self.gradients, self.made)
        return self.output.clone()  # the next replay, of whatever shape, writes over it


def shape_of(value: Any) -> Hashable:
    """What two values have in common if one recording serves both: all but the numbers in their tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.stride(), value.requires_grad
    if is_dataclass(value):
        return type(value), tuple(shape_of(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, tuple):
        return tuple(shape_of(item) for item in value)
    return cast(Hashable, value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its tensors replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(*(_map(function, getattr(value, field.name)) for field in fields(value)))
    if isinstance(value, tuple):
        return tuple(_map(function, item) for item in value)
    return value
