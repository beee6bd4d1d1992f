"""Compiled transformer blocks: one compilation for each class of block, and a bounded number of shapes.

Each block is compiled on its own. Blocks of a class share code and shapes, so what is compiled for the first
one serves all of them; embedders, the last layer and everything outside stay as they are. In eval mode
(validation, sample pictures) blocks run uncompiled: their shapes come once in a while and are not worth the wait.

Compiled code is kept in the user's cache folder, so that a second start finds it. A block that cannot be
compiled runs uncompiled, and so do all blocks from then on.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.files.user_cache import cache_folder
from library.models import attention
from library.models.activation_checkpoint import recompute_cheap

logger = logging.getLogger(__name__)

STATIC_SHAPES = 3  # with more shapes than this, one compilation serves all of them
WORTHWHILE_STEPS = 400
# Variants of one class of block: shapes, a mask or none, kinds of recomputation, strengths of a network.
_VARIANTS = 64


class CompiledBlocks:
    """The compiled forms of a transformer's blocks."""

    def __init__(self, blocks: Sequence[nn.Module], *, backend: str, shapes: int) -> None:
        """`shapes` is how many sizes of token streams the run will see."""
        self._failures = begin(backend)
        self.dynamic = shapes > STATIC_SHAPES
        self._compiled: dict[nn.Module, Callable[..., Any]] = {
            block: torch.compile(block, backend=backend, dynamic=None if self.dynamic else False)
            for block in blocks
        }
        self._recomputing: Callable[..., Any] = torch.compile(
            recompute_cheap, backend=backend, dynamic=None if self.dynamic else False
        )
        self.failure: Exception | None = None

    def active(self, block: nn.Module) -> bool:
        """Whether `block` runs compiled now."""
        return self.failure is None and block.training

    def call(self, block: nn.Module, *, recomputes: bool = False) -> Callable[..., Any]:
        """What to call in place of `block` now; with `recomputes`, `recompute_cheap` of it."""
        if not self.active(block):
            return block
        function = partial(self._recomputing, block) if recomputes else self._compiled[block]
        return lambda *arguments: self._run(function, block, *arguments)

    def _run(self, function: Callable[..., Any], block: nn.Module, *arguments: object) -> Any:
        if self.failure is None:  # a recomputation may come after it
            try:
                return function(*arguments)
            except self._failures as error:
                self.failure = error
                lines = str(error).strip().splitlines()
                logger.warning(
                    "the blocks cannot be compiled, so the run goes on without: %s: %s",
                    type(error).__name__, lines[0] if lines else "no reason given",
                )  # fmt: skip
                logger.debug("compilation failed", exc_info=True)
        return block(*arguments)

    def streams(self, *tokens: Tensor, axis: int) -> None:
        """Tell the compiler that the number of tokens along `axis` will vary, if it will."""
        if self.dynamic:
            for stream in tokens:
                torch._dynamo.maybe_mark_dynamic(stream, axis)


def pays(*, steps: int, device: torch.device) -> bool:
    """Whether compiling is worth its wait of a minute at most: `auto`.

    It saves about a third of a step: with this many steps ahead, more than a cold start costs.
    """
    return (
        device.type == "cuda" and steps >= WORTHWHILE_STEPS and importlib.util.find_spec("triton") is not None
    )


def begin(backend: str) -> type[Exception]:
    """Set the compiler up and start what it runs beside: worth doing before weights are read. Again is harmless.

    Returns what the compiler raises when it, and not the block, fails.
    """
    failure = _configure()
    if backend == "inductor" and importlib.util.find_spec("triton") is not None:
        start_workers()
    return failure


def start_workers() -> None:
    """Start the processes in which kernels are compiled, deaf to what asks a run to stop.

    A signal often goes to all processes of a run. Were it to end these, the run would wait for their answer for
    ever, and never come to the end of its step. They end with the run.
    """
    compiling: Any = importlib.import_module("torch._inductor.async_compile")
    with _deaf_children():
        compiling.AsyncCompile.warm_pool()


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes begun meanwhile, and theirs, get no stop signal; to this one it comes when the block is over."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where no signal goes to a group
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _configure() -> type[Exception]:
    """Set the compiler up for blocks. Returns what it raises when it, and not the block, fails."""
    # Imported here because it takes a second, which uncompiled runs need not wait for.
    dynamo = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = max(_VARIANTS, dynamo.config.recompile_limit)
    # A backward pass that cannot be compiled is found out in the first forward pass.
    autograd: Any = importlib.import_module("torch._functorch.config")
    # Graphs with autograd functions of one's own, which ours are, are traced anew at each start unless told otherwise.
    # What such a function does is in the graph that a kept one is found by.
    for name in ("force_non_lazy_backward_lowering", "autograd_cache_allow_custom_autograd_functions"):
        if hasattr(autograd, name):  # not in every torch
            setattr(autograd, name, True)
    # The kernel of attention is chosen while a block is traced, and is in nothing else that a kept graph is found by.
    given = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
    torch.compiler.config.cache_key_tag = f"{given} attention {attention.in_effect()}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "inductor"))
    failure: type[Exception] = dynamo.exc.TorchDynamoException
    return failure
