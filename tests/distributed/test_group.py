"""Ranks that stop: the first says why, the others follow."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from library.distributed.base import World
from library.distributed.group import Group
from library.errors import RankFollowed, RankLost, TrainerError


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


def test_a_connection_that_breaks_without_a_word_is_no_bug():
    store = HashStore()
    left = [Group(World(rank, 3, rank, torch.device("cpu")), store) for rank in (0, 2)]
    broken = "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:10117"
    with pytest.raises(RankLost, match=r"another rank is gone .*Connection closed by peer"):
        left[0].close(failure=broken)
    with pytest.raises(RankFollowed):
        left[1].close(failure=broken)  # one of those that are left says it


def test_the_main_rank_leaves_a_wait_last():
    """It may keep the store: who still looks there would find it gone."""
    store = HashStore()
    main, other = (Group(World(rank, 2, rank, torch.device("cpu")), store) for rank in (0, 1))
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(main.wait, "x")
        store.add("arrived/x", 1)
        time.sleep(1.0)
        assert not waiting.done()
        store.add("arrived/x", -1)
        other.wait("x")
        waiting.result(timeout=20)
