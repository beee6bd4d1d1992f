"""Which captions of a run are encoded ahead, and which of them a visit trains with.

A caption that changes from visit to visit is drawn as it would be without a cache, for up to k visits of its
image: without token warm-up the first k. Later visits take these in turn. With token warm-up and more than k
visits, half of the k belong to visits within it, spread evenly, and a visit between two takes the next one, so
that captions grow as they would and are whole from its end on. The plan tells which step a visit falls into. A
run in which no image has more than k visits trains on the very captions that it would without a cache.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from library.data import captions
from library.data.dataset import TrainingData, is_dropped, undropped_caption
from library.data.plan import Plan
from library.data.records import ImageRecord


class When(NamedTuple):
    """A visit of a record and the optimizer step it falls into, both from 0."""

    step: int
    visit: int


@dataclass(frozen=True, slots=True)
class Variants:
    """The encoded captions of one record."""

    own: Mapping[int, str]  # by visit: those that were drawn for it
    warming: tuple[tuple[int, str], ...]  # (step, caption) of encoded visits within token warm-up, ascending
    full: tuple[str, ...]  # captions of encoded visits after it

    @property
    def captions(self) -> tuple[str, ...]:
        """All of them once, whole captions first."""
        if not self.warming and len(self.full) == 1:
            return self.full
        return tuple(dict.fromkeys([*self.full, *(caption for _, caption in self.warming)]))

    def caption(self, *, visit: int, step: int) -> str:
        """What a visit trains with that falls into optimizer step `step`."""
        own = self.own.get(visit)
        if own is not None:
            return own
        following = bisect_left(self.warming, step, key=lambda pair: pair[0])
        if following < len(self.warming):
            return self.warming[following][1]
        return self.full[visit % len(self.full)] if self.full else self.warming[-1][1]


def plan_variants(data: TrainingData, plan: Plan, *, most: int) -> dict[str, Variants]:
    """The captions to encode, by record key: one where they do not vary, at most `most` (k) where they do."""
    visits = _visits(data, plan, most)
    return {
        record.key: _variants(data, record, visits[number], most)
        if visits.get(number)
        else _one(data, record)
        for number, record in enumerate(data.records)
    }


def _one(data: TrainingData, record: ImageRecord) -> Variants:
    """The one caption of a record whose captions do not vary, or which no step of the run visits."""
    return Variants({}, (), (undropped_caption(data, record, visit=0, step=data.max_train_steps),))


def _visits(data: TrainingData, plan: Plan, most: int) -> Mapping[int, list[When]]:
    """Visits of the records whose captions vary, as they come: past token warm-up each has more than `most`, if
    the run is long enough.
    """
    varying = {number for number, record in enumerate(data.records) if captions.varies(data.subset(record))}
    found: dict[int, list[When]] = defaultdict(list)
    if not varying:
        return found
    records = [data.records[number] for number in varying]
    warming = max(captions.warmup_end(data.subset(record), data.max_train_steps) for record in records)
    epochs = math.ceil(warming / plan.steps_per_epoch) + most // min(r.num_repeats for r in records) + 1
    for index in range(min(plan.total_steps, epochs * plan.steps_per_epoch)):
        for unit in plan.step(index).units:
            for sample in unit.samples:
                if sample.record in varying:
                    found[sample.record].append(When(index, sample.visit))
    return found


def _variants(data: TrainingData, record: ImageRecord, visits: list[When], most: int) -> Variants:
    warming, full = _chosen(data, record, visits, most)
    texts = {
        when: undropped_caption(data, record, visit=when.visit, step=when.step) for when in [*warming, *full]
    }
    return Variants(
        own={when.visit: text for when, text in texts.items()},
        warming=tuple((when.step, texts[when]) for when in warming),
        full=tuple(texts[when] for when in full),
    )


def _chosen(
    data: TrainingData, record: ImageRecord, visits: list[When], most: int
) -> tuple[Collection[When], Collection[When]]:
    """The visits to encode within token warm-up, and after it."""
    end = captions.warmup_end(data.subset(record), data.max_train_steps)
    if len(visits) <= most:  # each has its own, and a dropped one needs none
        per_epoch = record.num_repeats
        kept = [w for w in visits if not is_dropped(data, record, visit=w.visit, epoch=w.visit // per_epoch)]
        visits = kept or visits[:1]
    warming = sorted(when for when in visits if when.step < end)
    full = sorted((when for when in visits if when.step >= end), key=lambda when: when.visit)
    if len(visits) <= most:
        return warming, full
    share = min(len(warming), max(most // 2, most - len(full)))
    return _last_of_parts(warming, share), full[: most - share]


def _last_of_parts(visits: Sequence[When], count: int) -> list[When]:
    """The last of each of `count` parts of about equal length."""
    return [visits[(part + 1) * len(visits) // count - 1] for part in range(count)]
