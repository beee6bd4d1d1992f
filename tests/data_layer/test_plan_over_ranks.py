"""What ranks are dealt, over random datasets: 1-500 images in 1-30 buckets, 1-8 ranks, batches of 1-8, 1-4 accumulated.

`test_data_plan.py` looks at steps; here every property is asked of what the ranks get, as a run reads it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.dataset import MicroBatchSampler
from library.data.plan import MicroBatch, Plan, PlannedImage, PlanSettings, units_per_step

EPOCHS = 2
SIDES = range(64, 64 + 16 * 6, 16)
BUCKETS = [(width, height) for width in SIDES for height in SIDES][:30]
WORLDS = range(1, 9)


@dataclass(frozen=True)
class Case:
    plan: Plan
    world: int  # the ranks of the run whose batch and accumulation gave the size of a step

    def dealt(self, world: int, *, start: int = 0) -> list[list[MicroBatch]]:
        """The micro-batches of each rank, as its loader asks for them."""
        return [
            list(MicroBatchSampler(self.plan, rank=rank, world=world, start_step=start))
            for rank in range(world)
        ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_images, num_buckets = draw(st.integers(1, 500)), draw(st.integers(1, 30))
    batch_sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=2))
    world, accumulation = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    # One number decides the pictures: to draw each of 500 would be most of the test's time.
    chance = random.Random(draw(st.integers(0, 2**32)))
    images = tuple(
        PlannedImage(f"{d}/f/{number}", d, chance.choice(BUCKETS[:num_buckets]), chance.choice((1, 1, 2, 3)))
        for number, d in enumerate(chance.randrange(len(batch_sizes)) for _ in range(num_images))
    )
    size = units_per_step(batch_sizes, world=world, accumulation=accumulation, global_batch_size=None)
    options = PlanSettings(
        seed=draw(st.integers(0, 99)), batch_sizes=tuple(batch_sizes), units_per_step=size,
        max_train_epochs=EPOCHS,
    )  # fmt: skip
    return Case(Plan(images, options), world)


def in_order(dealt: Sequence[Sequence[MicroBatch]]) -> list[MicroBatch]:
    """What all ranks train on, fillers left out, step by step in the order of the plan."""
    turns = zip(*dealt, strict=True)
    return [micro for turn in turns for micro in turn if any(micro.shares)]


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_ranks_do_the_same_number_of_micro_batches_of_the_same_steps(case: Case):
    dealt = case.dealt(case.world)
    passes = -(-case.plan.settings.units_per_step // case.world)
    expected = [
        (step, step // case.plan.steps_per_epoch)
        for step in range(case.plan.total_steps)
        for _ in range(passes)
    ]
    for rank, micros in enumerate(dealt):
        # Nothing by which a rank could take another way than its peers: not the count, not step, not epoch.
        assert [(micro.step, micro.epoch) for micro in micros] == expected
        assert len(MicroBatchSampler(case.plan, rank=rank, world=case.world, start_step=0)) == len(micros)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_ranks_together_see_every_repeat_of_every_image_once_an_epoch(case: Case):
    seen = Counter(
        (micro.epoch, sample) for micro in in_order(case.dealt(case.world)) for sample in micro.samples
    )
    assert set(seen.values()) == {1}
    assert {(epoch, *sample) for epoch, sample in seen} == {
        (epoch, number, epoch * image.num_repeats + repeat)
        for epoch in range(EPOCHS)
        for number, image in enumerate(case.plan.images)
        for repeat in range(image.num_repeats)
    }


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_a_micro_batch_is_of_one_bucket_and_the_shares_of_a_step_sum_to_one(case: Case):
    dealt = case.dealt(case.world)
    for micro in (micro for micros in dealt for micro in micros):
        images = [case.plan.images[sample.record] for sample in micro.samples]
        assert {(image.dataset, image.bucket) for image in images} == {(micro.dataset, micro.bucket)}
        assert 1 <= len(images) <= case.plan.settings.batch_sizes[micro.dataset]
        assert len(micro.shares) == len(images)
    for _, step in groupby(in_order(dealt), key=lambda micro: micro.step):
        shares = [share for micro in step for share in micro.shares]
        assert sum(shares) == pytest.approx(1.0)
        assert len(set(shares)) == 1


@settings(max_examples=100, deadline=None)
@given(case=cases(), world=st.sampled_from(WORLDS))
def test_a_step_is_the_same_on_any_number_of_ranks_and_padded_only_where_work_is_lacking(
    case: Case, world: int
):
    dealt = case.dealt(world)
    real = [(micro.step, micro.samples, micro.shares) for micro in in_order(dealt)]
    alone = [(micro.step, micro.samples, micro.shares) for micro in in_order(case.dealt(1))]
    assert real == alone
    fillers = Counter(micro.step for micros in dealt for micro in micros if not any(micro.shares))
    passes = -(-case.plan.settings.units_per_step // world)
    for step in range(case.plan.total_steps):
        assert fillers[step] == passes * world - len(case.plan.step(step).units)


@settings(max_examples=100, deadline=None)
@given(case=cases(), world=st.sampled_from(WORLDS), data=st.data())
def test_a_run_that_resumes_anywhere_on_any_ranks_does_the_rest_of_the_plan(
    case: Case, world: int, data: st.DataObject
):
    start = data.draw(st.integers(0, case.plan.total_steps))
    whole = case.dealt(world)
    fresh = Case(Plan(case.plan.images, case.plan.settings), world)
    assert fresh.dealt(world, start=start) == [
        [micro for micro in micros if micro.step >= start] for micros in whole
    ]
    assert fresh.plan.fingerprint() == case.plan.fingerprint()
