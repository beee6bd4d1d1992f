"""What is said when memory runs out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from library.config.train_config import TrainConfig
from library.errors import OutOfMemory
from library.train.exhausted import explained, less_memory


def test_what_takes_less_is_what_the_run_does_not_use_yet():
    config = TrainConfig()
    assert "gradient_checkpointing" in list(less_memory(config))
    memory = replace(config.memory, gradient_checkpointing=True, blocks_to_swap=8)
    said = list(less_memory(replace(config, memory=memory)))
    assert "gradient_checkpointing" not in said
    assert "a larger blocks_to_swap" in said
    for blocks in (None, 8, "auto"):
        few = list(less_memory(replace(config, memory=replace(memory, recompute_blocks=blocks))))
        assert any(one.startswith("recompute_blocks left out") for one in few) == (blocks is not None)


def test_memory_that_ran_out_is_one_sentence_and_other_errors_are_left_alone():
    message = "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 23 GiB"
    said = r"ran out \(CUDA out of memory\); what takes less: cache_latents"
    with pytest.raises(OutOfMemory, match=said), explained(TrainConfig()):
        raise torch.OutOfMemoryError(message)
    with pytest.raises(OutOfMemory, match="main memory ran out"), explained(TrainConfig()):
        torch.empty(2**58)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"), explained(TrainConfig()):
        torch.ones(2) @ torch.ones(3)
