"""Bucket arithmetic against vectors recorded from Kohya's trainer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import golden

from library.config.dataset_settings import DatasetSettings
from library.data.buckets import (
    Shapes,
    bucket_info,
    bucket_rule,
    centre_offset,
    crop_box,
    place_without_upscaling,
    predefined_resolutions,
)
from library.errors import ConfigError, DatasetError

VECTORS = golden("vectors")


@pytest.mark.parametrize("name", VECTORS["bucket_resolutions"])
def test_predefined_resolutions_are_kohyas(name):
    size, low, high, step = name.split("/")
    resolution = tuple(int(side) for side in size.split("x"))
    found = predefined_resolutions(
        resolution, smallest=int(low[3:]), largest=int(high[3:]), step=int(step[4:])
    )
    assert [list(one) for one in found] == VECTORS["bucket_resolutions"][name]


@pytest.mark.parametrize(
    "case", VECTORS["select_bucket"], ids=lambda case: f"{case['image']}-{case['no_upscale']}"
)
def test_placement_is_kohyas(case):
    rule = bucket_rule(
        DatasetSettings(
            resolution=tuple(case["resolution"]),
            enable_bucket=True,
            min_bucket_reso=case["min"],
            max_bucket_reso=case["max"],
            bucket_reso_steps=case["step"],
            bucket_no_upscale=case["no_upscale"],
        )
    )
    placement = rule.place(tuple(case["image"]))
    assert list(placement.bucket) == case["bucket"]
    assert list(placement.resized) == case["resized"]
    assert placement.aspect_error == pytest.approx(case["ar_error"], abs=1e-6)
    assert crop_box(placement.bucket, tuple(case["image"])) == pytest.approx(case["crop_ltrb"], abs=1e-4)


@settings(max_examples=200, deadline=None)
@given(
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    step=st.sampled_from([16, 32, 64]),
    no_upscale=st.booleans(),
)
def test_resized_image_covers_its_bucket(size, step, no_upscale):
    rule = bucket_rule(
        DatasetSettings(
            resolution=(512, 384),
            enable_bucket=True,
            min_bucket_reso=128,
            bucket_reso_steps=step,
            bucket_no_upscale=no_upscale,
        )
    )
    if no_upscale and min(size) < step:
        with pytest.raises(DatasetError, match=f"{size[0]}x{size[1]}"):
            rule.place(size)
        return
    if no_upscale and min(size) * 512 * 384 / max(size) < (4 * step) ** 2:
        return  # a long picture may have less than a step left once it is scaled down
    placement = rule.place(size)
    assert all(have >= need for have, need in zip(placement.resized, placement.bucket, strict=True))
    assert all(side % step == 0 and side > 0 for side in placement.bucket)
    if no_upscale:
        assert all(now <= before + 1 for now, before in zip(placement.resized, size, strict=True))
    left, top = centre_offset(placement.resized, placement.bucket)
    assert 0 <= left <= placement.resized[0] - placement.bucket[0]
    assert 0 <= top <= placement.resized[1] - placement.bucket[1]


@pytest.mark.parametrize("size", [(63, 200), (4000, 5), (1, 1)])
def test_image_below_a_step_is_named(size):
    with pytest.raises(DatasetError, match=f"{size[0]}x{size[1]} .*bucket_reso_steps=64"):
        place_without_upscaling(size, area=512 * 512, step=64)


def test_step_larger_than_the_resolution_is_refused():
    with pytest.raises(ConfigError, match="no bucket"):
        bucket_rule(DatasetSettings(resolution=(48, 48), enable_bucket=True, min_bucket_reso=0))


def test_limits_below_the_step_give_no_empty_bucket():
    found = predefined_resolutions((128, 128), smallest=0, largest=256, step=64)
    assert found == ((64, 192), (64, 256), (128, 128), (192, 64), (256, 64))


def test_bucket_info_counts_repeats_but_not_in_the_error():
    rule = bucket_rule(DatasetSettings(resolution=(64, 64)))
    info = bucket_info([(rule.place((64, 64)), 5), (rule.place((128, 64)), 1)])
    assert info == {"buckets": {"0": {"resolution": [64, 64], "count": 6}}, "mean_img_ar_error": 0.5}


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    resolution=st.sampled_from([(512, 512), (1024, 1024), (768, 1344), (256, 256)]),
    step=st.sampled_from([16, 64]),
)
def test_the_nearest_shape_is_the_first_of_the_least_difference(size, resolution, step):
    shapes = predefined_resolutions(resolution, smallest=128, largest=2048, step=step)
    aspect = size[0] / size[1]
    first = size if size in shapes else min(shapes, key=lambda one: abs(one[0] / one[1] - aspect))
    assert Shapes.of(shapes).nearest(size) == first
