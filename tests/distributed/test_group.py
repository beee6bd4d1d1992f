"""Ranks that stop: the first says why, the others follow."""

from __future__ import annotations

import pytest
import torch
from torch.distributed import HashStore

from library.distributed.base import World
from library.distributed.group import Group
from library.errors import TrainerError


def test_the_echo_of_another_ranks_failure_is_no_failure_of_its_own():
    store = HashStore()
    first, second = (Group(World(rank, 2, rank, torch.device("cpu")), store) for rank in (0, 1))
    first.close(failure="OSError: No space left on device")
    for echo in (
        lambda: second.close(failure="RuntimeError: Connection closed by peer"),
        lambda: second.wait("x"),
    ):
        with pytest.raises(
            TrainerError, match="another rank stopped: rank 0: OSError: No space left on device"
        ):
            echo()
