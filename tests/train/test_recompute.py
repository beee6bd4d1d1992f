"""How many blocks are recomputed: what a number changes (memory only), and how auto finds it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_train_network import main
from library.data.plan import Plan, PlannedImage, PlanSettings
from library.distributed.ddp import DdpBackend
from library.models import frozen
from library.models.precision import block_linears
from library.train import graphs, recompute
from library.train.build import build_adapter
from library.train.recompute import Costs, Room, Shape, measure, share_of_others, unit_shapes
from library.train.setup import connected
from tests.distributed.ranks import start
from tests.e2e.running import draw_pictures, write_config
from tools.bench_data import SIZES
from tools.bench_train import assemble, parse

BLOCKS = 4  # of the tiny size: two double, two single


class Storages:
    """A `Gauge` for any device: bytes of the storages that were noted and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._most = 0

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        found = StorageWeakRef(storage)
        known = self._seen.get(found.cdata)
        if known is None or known[0].expired():
            self._seen[found.cdata] = (found, storage.nbytes())

    def in_use(self) -> int:
        self._seen = {key: pair for key, pair in self._seen.items() if not pair[0].expired()}
        return sum(size for _, size in self._seen.values())

    def look(self) -> None:
        self._most = max(self._most, self.in_use())

    def begin(self) -> None:
        self._most = self.in_use()

    def peak(self) -> int:
        return self._most


class LiveBytes(Storages, TorchDispatchMode):
    """Bytes of all that was made within it and is still there. Slow."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        self.look()
        return made


class SavedBytes(Storages):
    """Bytes of the tensors that autograd holds, but for those of `modules`.

    What is recomputed in a backward pass it does not see: its peak is that of the forward pass.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        own = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        self._own = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in own}

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._save, lambda tensor: tensor)

    def _save(self, tensor: Tensor) -> Tensor:
        if StorageWeakRef(tensor.untyped_storage()).cdata not in self._own:
            self.note(tensor)
            self.look()
        return tensor.detach()  # itself, it would hold the graph that holds it


@contextmanager
def tiny(*words: str) -> Iterator[tuple]:
    """Job, what is trained, the forward pass of its largest batch, and a gauge that looks at it."""
    own, config = parse([
        "--size", "tiny", "--seed", "1", "--train_batch_size", "2", "--resolutions", "64x64,96x64",
        "--optimizer_args", "fused=False", "--gradient_checkpointing", *words,
    ])  # fmt: skip
    with connected(config) as backend:
        job, trained, made = assemble(config, backend, SIZES[own.size], own.resolutions, images=3)
        forward = recompute.rehearsal(
            job,
            trained,
            build_adapter(job, trained),
            made.objective,
            recompute_shapes(job)[0],
        )
        gauge = SavedBytes(trained.root)
        with gauge.hooks():
            yield job, trained, forward, gauge


def recompute_shapes(job) -> tuple[Shape, ...]:
    return unit_shapes(job.data.plan, text_tokens=job.loader.t5_length)


def held(trained, forward, gauge, blocks: int) -> int:
    trained.root.transformer.recompute_first(blocks)
    before = gauge.in_use()
    loss = forward()
    after = gauge.in_use()
    del loss
    assert gauge.in_use() == before, "nothing outlives the loss"
    return after - before


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--cpu_offload_checkpointing",),
        ("--base_compute", "fp8", "--join_adapter", "on"),
        ("--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "factor=4"),
    ],
    ids=["lora", "offloaded", "fp8", "lokr"],
)
def test_what_is_measured_at_three_numbers_holds_for_all(words):
    with tiny(*words) as (job, trained, forward, gauge):
        assert forward().item() == forward().item()
        costs = measure(trained.root.transformer, forward, trained.parameters, gauge, lambda _: True)
        assert all(parameter.grad is None for parameter in trained.parameters)
        assert trained.root.transformer.recomputation.blocks is None
        direct = [held(trained, forward, gauge, blocks) for blocks in range(BLOCKS + 1)]
        first, *others = (one - other for one, other in pairwise(direct))
        assert others == list(costs.kept[1:])
        assert first <= costs.kept[0], "less, because nothing before it is trained"
        double, single = costs.kept[1:3]
        assert 0 < single < double < 2 * single
        assert costs.all_recomputed >= direct[BLOCKS]
        for blocks in range(1, BLOCKS + 1):
            assert costs.of(blocks) == costs.all_recomputed + direct[blocks] - direct[BLOCKS]
        assert job.state.step == 0


def test_a_step_takes_no_more_than_was_said():
    with tiny() as (_, trained, forward, _), LiveBytes() as gauge:
        transformer = trained.root.transformer
        costs = measure(transformer, forward, trained.parameters, gauge, lambda _: True)
        taken = []
        for blocks in range(BLOCKS, -1, -1):
            transformer.recompute_first(blocks)
            before = gauge.in_use()
            gauge.begin()
            loss = forward()
            if blocks == BLOCKS - 2:
                assert gauge.peak() - before <= costs.of(BLOCKS - 1), "so that it may be tried where one fits"
            loss.backward()
            del loss
            taken.append(gauge.peak() - before)
            for parameter in trained.parameters:
                parameter.grad = None
        said = [costs.of(blocks) for blocks in range(BLOCKS, -1, -1)]
        assert taken[0] == said[0]
        # One block is recomputed where it was measured, and none where all are kept: what is said is a block too much.
        for number, (one, other) in enumerate(zip(taken, said, strict=True)):
            assert other - max(costs.kept) <= one <= other, number


def test_blocks_are_tried_only_where_those_behind_them_fit():
    with tiny() as (_, trained, forward, gauge):
        transformer = trained.root.transformer
        whole = measure(transformer, forward, trained.parameters, gauge, lambda _: True)
        _, _, single, last = whole.kept
        both = whole.all_recomputed + single + last
        tried = whole.all_recomputed + 4 * single  # as for two single blocks in place of a double one
        for bytes_, fewest, least in (
            (tried, 1, 1), (tried - 1, 2, 2), (both, 2, 2), (both - 1, 3, 2), (both - single - 1, 4, 3),
        ):  # fmt: skip
            room = Room(bytes_, recorded=False)
            with patch.object(transformer, "recompute_first", wraps=transformer.recompute_first) as chosen:
                costs = measure(transformer, forward, trained.parameters, gauge, room)
            assert costs.fewest(room) == fewest
            assert min(call.args[0] for call in chosen.mock_calls if call.args[0] is not None) == least
            assert costs.kept[-1] == last


def test_the_choice_is_put_in_effect_and_said(caplog):
    with tiny("--base_compute", "fp8") as (job, trained, forward, gauge):
        transformer, loss = trained.root.transformer, forward().item()
        costs = measure(transformer, forward, trained.parameters, gauge, lambda _: True)
        for spare, expected in ((0, None), (costs.kept[-1], 3), (costs.of(0) + (1 << 30), 0)):
            room = Room(costs.all_recomputed + spare, recorded=False)
            caplog.clear()
            with caplog.at_level(logging.INFO):
                recompute.choose(transformer, forward, trained.parameters, job.backend, gauge, room)
            assert transformer.recomputation.blocks == expected
            number = BLOCKS if expected is None else expected
            assert f"recompute_blocks: {number} of 4 (activations of a block 0.0 GB, " in caplog.text
            # The copy of fp8 weights that the backward pass wants comes last.
            copied = [name for name, _ in trained.root.named_buffers() if name.endswith("weight_transposed")]
            scaled = [linear for linear in block_linears(transformer) if frozen.is_scaled(linear)]
            assert len(copied) == (len(scaled) if expected == 0 else 0)
            assert forward().item() == loss


@given(
    peak=st.integers(0, 100),
    kept=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    bytes_=st.integers(0, 300),
    recorded=st.booleans(),
    other=st.floats(0, 1),
)
def test_no_fewer_blocks_would_fit(peak, kept, bytes_, recorded, other):
    costs, room = Costs(peak, tuple(kept)), Room(bytes_, recorded, other)
    with patch.object(graphs, "RESERVE", 7):
        fewest = costs.fewest(room)
        assert fewest == len(kept) or room(costs.of(fewest))
        assert not any(room(costs.of(less)) for less in range(fewest))
        if recorded and fewest < len(kept):
            assert bytes_ - costs.of(fewest) >= max(7, int(other * costs.of(fewest)))


@given(st.data())
def test_the_largest_batch_of_the_plan_is_rehearsed(data):
    buckets = st.sampled_from([(64, 64), (96, 64), (64, 96), (512, 512), (1024, 1024)])
    images = tuple(
        PlannedImage(str(number), dataset, bucket, repeats)
        for number, (dataset, bucket, repeats) in enumerate(
            data.draw(
                st.lists(st.tuples(st.integers(0, 1), buckets, st.integers(1, 3)), min_size=1, max_size=12)
            )
        )
    )
    batch_sizes = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    plan = Plan(images, PlanSettings(seed=0, batch_sizes=batch_sizes, units_per_step=2, max_train_epochs=1))
    shapes = unit_shapes(plan, text_tokens=512)
    units = [unit for step in range(plan.steps_per_epoch) for unit in plan.step(step).units]
    expected = {
        Shape(len(u.samples) * (512 + u.bucket[0] * u.bucket[1] // 256), len(u.samples), u.dataset, u.bucket)
        for u in units
    }
    assert set(shapes) == expected
    assert shapes[0].tokens == max(shape.tokens for shape in expected)
    share = share_of_others(shapes, several=False)
    assert share == (
        sorted(shape.tokens for shape in shapes)[-2] / shapes[0].tokens if len(shapes) > 1 else 0
    )
    assert share_of_others(shapes, several=True) == 1


def test_the_rehearsed_batch_has_the_size_asked_for_and_text_of_full_length():
    with tiny("--apply_t5_attn_mask") as (job, *_):
        for shape in recompute_shapes(job):
            batch = recompute.batch_of(job, shape)
            assert batch.latents.shape == (shape.rows, 16, shape.bucket[1] // 8, shape.bucket[0] // 8)
            assert batch.text.t5_hidden.shape[1] == job.loader.t5_length
            assert batch.text.t5_mask.all()
        assert recompute_shapes(job)[0].rows == 2


def test_auto_recomputes_all_where_memory_is_not_measured(caplog):
    with caplog.at_level(logging.INFO), tiny("--recompute_blocks", "auto") as (_, trained, *_):
        assert trained.root.transformer.recomputation.blocks is None
    assert "recompute_blocks: all, since memory is measured on an NVIDIA GPU" in caplog.text


CASES = {
    "kept": {"gradient_checkpointing": False},
    "all": {},
    "none": {"recompute_blocks": 0},
    "some": {"recompute_blocks": 1, "cpu_offload_checkpointing": True},
    "swapped": {"recompute_blocks": 2, "blocks_to_swap": 1},
    "rehearsed": {"recompute_blocks": "auto", "blocks_to_swap": 1},
}


def rehearse(job, trained, adapter, objective) -> None:
    """`settle` as on a GPU with room for all but one block, looked at by a gauge for any device."""
    if job.config.memory.recompute_blocks != "auto":
        return
    transformer, gauge = trained.root.transformer, SavedBytes(trained.root)
    forward = recompute.rehearsal(job, trained, adapter, objective, recompute_shapes(job)[0])
    with gauge.hooks(), torch.random.fork_rng(devices=[]):
        costs = measure(transformer, forward, trained.parameters, gauge, lambda _: True)
        room = Room(costs.of(1), recorded=False)
        recompute.choose(transformer, forward, trained.parameters, job.backend, gauge, room)
    assert transformer.recomputation.blocks == 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("data")
    draw_pictures(data / "1_same", [(64, 64)] * 3)
    draw_pictures(data / "1_wide", [(96, 64)] * 2)
    return data


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "out-state" / "train_state.json").read_text(encoding="utf-8"))
    return state["losses"]


def config(pictures: Path, folder: Path, **changes: object) -> Path:
    options = {
        "gradient_checkpointing": True,
        "save_state_on_train_end": True,
        "learning_rate": 1e-2,
        **changes,
    }
    return write_config(folder.with_suffix(".toml"), pictures, folder, **options)


def test_neither_a_number_nor_its_choice_changes_a_number(tmp_path: Path, pictures: Path):
    for name, changes in CASES.items():
        with patch.object(recompute, "settle", rehearse):
            assert main(["--config_file", str(config(pictures, tmp_path / name, **changes))]) == 0
    expected = load_file(tmp_path / "kept" / "out.safetensors")
    for name in CASES:
        assert losses(tmp_path / name) == losses(tmp_path / "kept"), name
        got = load_file(tmp_path / name / "out.safetensors")
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], expected[key]) for key in expected), name


@contextmanager
def agreeing(marker: Path) -> Iterator[None]:
    """Within a rank: two and five blocks are what rank 0 and rank 1 would choose; notes what they come to."""
    wrap = DdpBackend.wrap

    def wrapped(self, module, optimizer, *, recordable=False):
        chosen = recompute.most(self, 5 if self.world.rank else 2, limit=7)
        marker.with_suffix(f".{self.world.rank}").write_text(str(chosen), encoding="utf-8")
        return wrap(self, module, optimizer, recordable=recordable)

    with patch.object(DdpBackend, "wrap", wrapped):
        yield


def test_ranks_agree_and_a_number_changes_no_number_there(tmp_path: Path, pictures: Path):
    for name, changes in {"all": {}, "some": {"recompute_blocks": 2}}.items():
        file = config(pictures, tmp_path / name, cache_latents_to_disk=True, train_batch_size=1, **changes)
        around = partial(agreeing, tmp_path / "chosen")
        running = start(
            ["--config_file", str(file)], ranks=2, screens=tmp_path / "said" / name, around=around
        )
        assert running.ended() == [0, 0], running.said()
    assert [(tmp_path / f"chosen.{rank}").read_text(encoding="utf-8") for rank in (0, 1)] == ["5", "5"]
    assert losses(tmp_path / "all") == losses(tmp_path / "some")
    whole, some = (load_file(tmp_path / name / "out.safetensors") for name in ("all", "some"))
    assert all(torch.equal(whole[key], some[key]) for key in whole)
