"""What the check of several ranks says of them and of their machines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.config.load import load_config
from library.config.train_config import TrainConfig
from library.distributed.base import World
from library.preflight import ranks
from library.preflight.facts import DiskFacts
from library.preflight.ranks import (
    Checked,
    RankFacts,
    check_ranks,
    common_options,
    disagreements,
    line,
    shortages,
)
from library.train.prepare import Data, ModelFiles, locate_models, read_data
from tests.e2e.running import draw_pictures, write_config

GB = 10**9


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, ModelFiles, Data]:
    folder = tmp_path_factory.mktemp("run")
    draw_pictures(folder / "data" / "1_same", [(64, 64)] * 2)
    path = write_config(folder / "c.toml", folder / "data", folder / "out", max_data_loader_n_workers=1)
    config = load_config(["--config_file", str(path)]).config
    return config, locate_models(config.model), read_data(config, seed=1, world_size=2)


def world(size: int, device: str = "cpu") -> World:
    return World(0, size, 0, torch.device(device))


def rank(number: int, **changes: object) -> RankFacts:
    usual = RankFacts(
        rank=number, host="box", torch="2.9", code="abc", options={"seed": "1", "learning_rate": "0.1"},
        memory=64 * GB, shared=8 * GB, unreachable=(),
    )  # fmt: skip
    return replace(usual, **changes)


def test_ranks_that_differ_cannot_train_together():
    assert not list(disagreements([rank(0), rank(1, torch="2.8", memory=1), rank(2, host="other")]))
    (said,) = disagreements(
        [rank(0), rank(1), rank(2, host="b", options={"seed": "2", "learning_rate": "1"})]
    )
    assert said.startswith("rank 2 on b has seed = 2 where rank 0 has 1, and 1 more options differ")
    (said,) = disagreements([rank(0), rank(1, host="b", code="abd")])
    assert said.startswith("rank 1 on b runs other code than rank 0 on box")


def test_paths_and_secrets_are_each_machines_own(run: tuple[TrainConfig, ModelFiles, Data]):
    options = common_options(run[0])
    assert options["learning_rate"] == "0.001"
    assert options["pretrained_model_name_or_path"] == "'polyrank/tiny-flux'"
    assert not {"output_dir", "train_data_dir", "wandb_api_key", "local_rank"} & options.keys()


def test_one_rank_is_checked_when_asked_to(run: tuple[TrainConfig, ModelFiles, Data]):
    config = run[0]
    assert check_ranks(config, world(1)) is None
    on = replace(config, distributed=replace(config.distributed, preflight="on"))
    checked = check_ranks(on, world(1))
    assert checked is not None
    assert checked.speed is None
    assert checked.facts[0].memory is None or checked.facts[0].memory > 0
    off = replace(config, distributed=replace(config.distributed, preflight="off"))
    assert check_ranks(off, world(2)) is None  # or it would look for a process group


def said(
    run: tuple[TrainConfig, ModelFiles, Data], *facts: RankFacts, config: TrainConfig | None = None
) -> list[str]:
    checked = Checked(world(len(facts)), facts, 0.2 * GB, 0.1)
    return list(shortages(checked, config or run[0], *run[1:]))


def test_what_a_machine_lacks_is_said(run: tuple[TrainConfig, ModelFiles, Data]):
    assert not said(run, rank(0), rank(1))
    (memory,) = said(run, rank(0), rank(1, memory=1000))
    assert memory.startswith("box has 1.0 kB of main memory free, and 2 ranks may take ")
    (shared,) = said(run, rank(0, host="a"), rank(1, host="b", shared=2000))
    assert shared.startswith("/dev/shm of b has 2.0 kB free, and the data workers of 1 rank put up to")
    assert "--shm-size" in shared
    (versions,) = said(run, rank(0), rank(1, torch="2.8"))
    assert versions.startswith("rank 1 on box has torch 2.8 and rank 0 has 2.9")


def test_memory_counts_what_each_rank_keeps(run: tuple[TrainConfig, ModelFiles, Data]):
    config, files, _ = run
    whole = ranks.transformer_bytes(config, files)
    assert whole == 4 * sum(torch.Size(shape).numel() for shape in files.parts["flux"].shapes().values())
    assert ranks.memory_needed(config, files, world(3), 3) == 3 * whole
    gpu = world(3, "cuda")
    assert ranks.memory_needed(config, files, gpu, 3) == 0  # mapped, and on its way to the GPU
    swaps = replace(config, memory=replace(config.memory, blocks_to_swap=1))
    assert 0 < ranks.memory_needed(swaps, files, gpu, 3) < 3 * whole
    zero = replace(config.distributed, deepspeed=True, zero_stage=3, offload_param_device="cpu")
    assert ranks.memory_needed(replace(config, distributed=zero), files, gpu, 3) >= whole


def test_workers_need_shared_memory_and_no_workers_none(run: tuple[TrainConfig, ModelFiles, Data]):
    config, files, data = run
    one, three = (ranks.shared_needed(config, files, data, world(3), number) for number in (1, 3))
    assert three == 3 * one > 0
    without = replace(config, dataset=replace(config.dataset, max_data_loader_n_workers=0))
    assert ranks.shared_needed(without, files, data, world(3), 3) == 0
    assert ranks.shared_needed(without, files, data, world(3, "cuda"), 3) == 3 * ranks.NCCL_BYTES


def test_all_is_well_in_one_line():
    checked = Checked(world(2), (rank(0), rank(1)), 12 * GB, 0.31)
    assert line(checked, [DiskFacts(Path("/data"), 1, 5 * GB)]) == (
        "preflight    2 x cpu, sums, broadcasts and copies arrive right, 12.0 GB/s summed, 64.0 GB of memory free, "
        "8.0 GB in /dev/shm, 5.0 GB on the disk of /data (0.3 s)"
    )
    apart = Checked(world(2), (rank(0, unreachable=(1,)), rank(1, unreachable=(0,))), 1.0, 0.0)
    assert "not all GPUs read one another directly" in line(apart, [])


def test_a_container_has_less_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "CONTROL_GROUP", tmp_path)
    assert ranks.container_memory() is None
    for name, text in {
        "memory.max": "max",
        "memory.current": "700",
        "memory.stat": "anon 400\nfile 300\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert ranks.container_memory() is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert ranks.container_memory() == 600
    assert ranks.free_memory() == 600
