"""The samples of the first epoch as they are shown: all of them, and as a batch would hold them."""

from __future__ import annotations

from collections import Counter

import torch
from test_data_loader import AUGMENTED, SIZES, make, plan_of

from library.data.dataset import load_batches
from library.data.inspection import first_epoch


def test_every_sample_of_the_first_epoch_is_shown_once_as_it_is_trained(tmp_path):
    data = make(tmp_path, **AUGMENTED)
    plan = plan_of(data)
    shown = [(bucket, view) for bucket in first_epoch(data, plan) for view in bucket.samples]
    assert Counter(view.record.path.stem for _, view in shown) == {str(n): 2 for n in range(len(SIZES))}
    assert len({bucket.bucket for bucket, _ in shown}) == len({place.bucket for place in data.placements})
    trained = {}
    for number, batch in enumerate(load_batches(data, plan)):
        if number == 2 * plan.steps_per_epoch:
            break
        images = batch.images if batch.images is not None else ()
        for visit, caption, image in zip(batch.visits, batch.captions, images, strict=True):
            trained[visit.sample, caption] = image
    for bucket, view in shown:
        assert torch.equal(trained[view.record.key, view.caption], view.image)
        assert view.image.shape[1:] == bucket.bucket[::-1]
        assert view.framing.bucket == bucket.bucket
    assert {view.flipped for _, view in shown} == {True, False}
    assert sum(bucket.num_samples for bucket in first_epoch(data, plan)) == 2 * len(SIZES)
