"""When memory runs out: what takes less, of the options that a run does not use yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from library.config.train_config import TrainConfig
from library.errors import OutOfMemory

_ON_THE_CPU = "DefaultCPUAllocator"  # in the RuntimeError that torch raises where main memory runs out


@contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Surround a run: memory that ran out becomes one sentence, `OutOfMemory`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).split(". ")[0]
        remedies = ", ".join(less_memory(config))
        raise OutOfMemory(f"the GPU's memory ran out ({first}); what takes less: {remedies}") from error
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(
            "the machine's main memory ran out; close other programs, lower max_data_loader_n_workers and "
            "blocks_to_swap, and cache to disk (cache_latents_to_disk, cache_text_encoder_outputs_to_disk)"
        ) from error


def ran_out(error: Exception) -> bool:
    """Whether memory, the GPU's or the machine's, ran out."""
    on_the_cpu = isinstance(error, RuntimeError) and _ON_THE_CPU in str(error)
    return on_the_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


def less_memory(config: TrainConfig) -> Iterator[str]:
    """What would take less GPU memory, the cheapest in time and quality first."""
    memory, caching = config.memory, config.caching
    if not caching.cache_latents:
        yield "cache_latents"
    if not caching.cache_text_encoder_outputs:
        yield "cache_text_encoder_outputs"
    if not memory.gradient_checkpointing:
        yield "gradient_checkpointing"
    elif memory.recompute_blocks is not None:
        yield "recompute_blocks left out, so that all blocks are recomputed"
    if not memory.fp8_base:
        yield "fp8_base"
    yield "a larger blocks_to_swap" if memory.blocks_to_swap else "blocks_to_swap"
    yield "a smaller train_batch_size with more gradient_accumulation_steps"
    yield "a smaller resolution"
    yield "a smaller network_dim"
