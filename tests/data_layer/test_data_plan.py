"""The plan of steps: nothing lost, nothing doubled, nothing that depends on who asks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.plan import Plan, PlannedImage, PlanSettings, deal, units_per_step
from library.errors import ConfigError

BUCKETS = [(256, 256), (192, 320), (320, 192), (512, 128)]


@st.composite
def plans(draw):
    batch_sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    images = draw(
        st.lists(
            st.tuples(st.integers(0, len(batch_sizes) - 1), st.sampled_from(BUCKETS), st.integers(1, 4)),
            min_size=1,
            max_size=25,
        )
    )
    planned = tuple(PlannedImage(f"{d}/f/{i}", d, b, r) for i, (d, b, r) in enumerate(images))
    options = PlanSettings(
        seed=draw(st.integers(0, 99)),
        batch_sizes=tuple(batch_sizes),
        units_per_step=draw(st.integers(1, 9)),
        max_train_epochs=3,
    )
    return Plan(planned, options)


def epoch_of(plan: Plan, epoch: int):
    count = plan.steps_per_epoch
    return [plan.step(index) for index in range(epoch * count, (epoch + 1) * count)]


@settings(max_examples=60, deadline=None)
@given(plan=plans(), epoch=st.integers(0, 2))
def test_an_epoch_visits_every_repeat_once(plan, epoch):
    visits = Counter(s for step in epoch_of(plan, epoch) for unit in step.units for s in unit.samples)
    assert set(visits.values()) == {1}
    expected = {
        (number, epoch * image.num_repeats + repeat)
        for number, image in enumerate(plan.images)
        for repeat in range(image.num_repeats)
    }
    assert {tuple(sample) for sample in visits} == expected


@settings(max_examples=60, deadline=None)
@given(plan=plans())
def test_counts_are_kohyas(plan):
    samples = Counter()
    for image in plan.images:
        samples[(image.dataset, image.bucket)] += image.num_repeats
    batches = sum(-(-n // plan.settings.batch_sizes[dataset]) for (dataset, _), n in samples.items())
    assert plan.batches_per_epoch == batches
    assert plan.steps_per_epoch == -(-batches // plan.settings.units_per_step)
    assert plan.total_steps == 3 * plan.steps_per_epoch
    steps = epoch_of(plan, 1)
    assert sum(len(step.units) for step in steps) == batches
    assert sum(len(step.units) < plan.settings.units_per_step for step in steps) <= 1
    for unit in (unit for step in steps for unit in step.units):
        assert len(unit.samples) <= plan.settings.batch_sizes[unit.dataset]
        for sample in unit.samples:
            image = plan.images[sample.record]
            assert (image.dataset, image.bucket) == (unit.dataset, unit.bucket)


@settings(max_examples=60, deadline=None)
@given(plan=plans(), world=st.sampled_from([1, 2, 3, 4, 8]))
def test_ranks_share_a_step_that_does_not_depend_on_them(plan, world):
    size = plan.settings.units_per_step
    for step in epoch_of(plan, 0):
        dealt = [deal(step, rank=rank, world=world, units_per_step=size) for rank in range(world)]
        assert {len(one) for one in dealt} == {-(-size // world)}
        real = [micro for one in dealt for micro in one if sum(micro.shares) > 0]
        assert sorted(micro.samples for micro in real) == sorted(unit.samples for unit in step.units)
        assert sum(sum(micro.shares) for micro in real) == pytest.approx(1.0)
        assert len({share for micro in real for share in micro.shares}) == 1
        fillers = [micro for one in dealt for micro in one if sum(micro.shares) == 0]
        assert all(micro.samples == step.units[-1].samples for micro in fillers)


def many(count: int, **changes) -> Plan:
    images = tuple(PlannedImage(f"0/f/{i}", 0, BUCKETS[i % 2], 2) for i in range(count))
    options = {"seed": 5, "batch_sizes": (2,), "units_per_step": 4, "max_train_steps": 50, **changes}
    return Plan(images, PlanSettings(**options))


def test_whole_steps_are_of_one_bucket():
    steps = epoch_of(many(64), 0)
    assert all(len({unit.bucket for unit in step.units}) == 1 for step in steps)


def test_epochs_and_seeds_differ_and_a_resumed_run_does_not():
    plan = many(30)
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)
    assert [s.units for s in first] != [s.units for s in second]
    assert [s.units for s in epoch_of(many(30, seed=6), 0)] != [s.units for s in first]
    whole = list(plan.micro_batches(rank=1, world=2))
    resumed = list(many(30).micro_batches(rank=1, world=2, start=23))
    assert resumed == [micro for micro in whole if micro.step >= 23]


def test_another_image_leaves_the_order_of_the_others_in_place():
    def order(plan):
        size = plan.settings.batch_sizes[0]
        assert size == 1
        names = [plan.images[u.samples[0].record].key for step in epoch_of(plan, 0) for u in step.units]
        return [name for name in names if not name.endswith("/x")]

    options = PlanSettings(seed=1, batch_sizes=(1,), units_per_step=50, max_train_epochs=1)
    images = tuple(PlannedImage(f"0/f/{i}", 0, BUCKETS[0], 1) for i in range(20))
    more = (*images[:7], PlannedImage("0/f/x", 0, BUCKETS[0], 1), *images[7:])
    assert order(Plan(images, options)) == order(Plan(more, options))


def test_fingerprint_follows_what_decides_a_step_only():
    base = many(8).fingerprint()
    assert base == many(8, max_train_steps=99).fingerprint()
    others = [many(9), many(8, seed=6), many(8, batch_sizes=(3,)), many(8, units_per_step=2)]
    assert len({base, *(one.fingerprint() for one in others)}) == 5


def test_report_lists_buckets():
    rows = [(r.bucket, r.images, r.samples, r.batches) for r in many(5).report()]
    assert rows == [((192, 320), 2, 4, 2), ((256, 256), 3, 6, 3)]


def test_units_per_step_from_processes_or_global_batch():
    assert units_per_step((2,), world=4, accumulation=3, global_batch_size=None) == 12
    assert units_per_step((2, 2), world=4, accumulation=1, global_batch_size=16) == 8
    assert units_per_step((2,), world=4, accumulation=1, global_batch_size=12) == 6
    with pytest.raises(ConfigError, match="multiple of train_batch_size"):
        units_per_step((2,), world=4, accumulation=1, global_batch_size=13)
    with pytest.raises(ConfigError, match="one train_batch_size"):
        units_per_step((2, 1), world=1, accumulation=1, global_batch_size=4)
