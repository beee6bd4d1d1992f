"""Pixels: every kind of picture, resizing against a plain reference, crops, masks and augmentation."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import write_picture
from PIL import Image

from library.config.train_config import OPTIONS
from library.data import images
from library.data.buckets import Placement
from library.data.decode import read_picture
from library.data.headers import read_header
from library.data.images import (
    Framing,
    frame,
    frame_face,
    image_tensor,
    mask_tensor,
    render,
)
from library.data.resize import resize
from library.errors import DatasetError
from library.randomness import Visit, generator


def rng(number: int = 0):
    return generator(3, Visit("a", number), "test")


def save(path, array, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_orientation_is_honoured_in_size_and_pixels(tmp_path, orientation, suffix):
    upright = read_picture(write_picture(tmp_path / "plain.png", (24, 16))).rgb.astype(int)
    turns = {  # how a camera that notes this value stored the upright scene
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](upright)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    stored.save(tmp_path / f"turned.{suffix}", exif=exif, **quality)
    header = read_header(tmp_path / f"turned.{suffix}")
    assert (header.size, header.orientation) == ((24, 16), orientation)
    picture = read_picture(tmp_path / f"turned.{suffix}")
    assert np.abs(picture.rgb.astype(int) - upright).max() <= 6


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(2, 0)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    rgb = read_picture(tmp_path / "grey.png").rgb
    assert np.array_equal(rgb[0, :, 0], np.arange(256))
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGB", "YCbCr"])
def test_opaque_modes_become_rgb(tmp_path, mode):
    base = Image.new("RGB", (9, 7), (255, 0, 0) if mode not in ("1", "L") else (255, 255, 255))
    suffix = "png" if mode in ("1", "L", "P", "RGB") else "jpg"
    base.convert(mode).save(tmp_path / f"a.{suffix}")
    picture = read_picture(tmp_path / f"a.{suffix}")
    assert picture.alpha is None
    assert picture.size == (9, 7)
    wanted = [255, 0, 0] if mode not in ("1", "L") else [255, 255, 255]
    assert np.abs(picture.rgb.astype(int) - wanted).max() <= 2


def test_transparent_pictures_lie_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0] = 200
    rgba[0, :, 3] = [0, 128, 255]
    picture = read_picture(save(tmp_path / "a.png", rgba))
    assert picture.rgb[0].tolist() == [[255, 255, 255], [227, 127, 127], [200, 0, 0]]
    assert picture.alpha is not None
    assert picture.alpha[0].tolist() == [0, 128, 255]
    grey = read_picture(save(tmp_path / "la.png", np.array([[[40, 0], [40, 255]]], np.uint8), "LA"))
    assert grey.rgb[0].tolist() == [[255] * 3, [40] * 3]


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png", transparency=0)
    picture = read_picture(tmp_path / "p.png")
    assert picture.rgb[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_picture(tmp_path / "a.webp").rgb[4, 4].tolist() == [255, 0, 0]


def test_truncated_file_is_named(tmp_path):
    path = write_picture(tmp_path / "a.png", (64, 64))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"a\.png cannot be decoded"):
        read_picture(path)


def covered(length: int, count: int) -> np.ndarray:
    """[count, length]: how much of each source pixel an output pixel covers, as shares."""
    scale = length / count
    low = np.arange(count)[:, None] * scale
    start = np.arange(length)[None]
    return np.clip(np.minimum(low + scale, start + 1) - np.maximum(low, start), 0, None) / scale


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    share=st.tuples(st.floats(0.02, 1.7), st.floats(0.02, 1.7)),
    seed=st.integers(0, 99),
)
def test_area_is_the_mean_over_the_covered_area(size, share, seed):
    resized = tuple(max(1, int(side * part)) for side, part in zip(size, share, strict=True))
    pixels = rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    expected = np.einsum(
        "yh,hwc,xw->yxc", covered(size[1], resized[1]), pixels.astype(float), covered(size[0], resized[0])
    )
    result = resize(pixels, resized, "area").astype(float)
    assert result.shape == (resized[1], resized[0], 3)
    assert np.abs(result - expected).max() <= 0.501
    assert np.array_equal(resize(pixels[..., 0], resized, "area"), result[..., 0])


def test_area_is_the_default_when_both_sides_shrink():
    pixels = rng().integers(0, 256, (6, 150, 3), dtype=np.uint8)
    expected = np.einsum("yh,hwc,xw->yxc", covered(6, 4), pixels.astype(float), covered(150, 70))
    assert np.abs(resize(pixels, (70, 4), None) - expected).max() <= 0.501


def test_lanczos_when_a_side_grows_and_by_name():
    pixels = rng().integers(0, 256, (20, 30, 3), dtype=np.uint8)
    larger = np.asarray(Image.fromarray(pixels).resize((40, 20), Image.Resampling.LANCZOS))
    assert np.array_equal(resize(pixels, (40, 20), None), larger)
    smaller = np.asarray(Image.fromarray(pixels).resize((9, 9), Image.Resampling.BICUBIC))
    assert np.array_equal(resize(pixels, (9, 9), "cubic"), smaller)


@pytest.mark.parametrize("name", [*OPTIONS["resize_interpolation"].row.choices, "box", None])
@pytest.mark.parametrize("resized", [(10, 8), (60, 40), (30, 10), (30, 20)])
def test_every_interpolation_keeps_flat_areas_and_the_range(name, resized):
    flat = np.full((20, 30, 3), 77, np.uint8)
    result = resize(flat, resized, name)
    assert result.shape == (resized[1], resized[0], 3)
    assert (result == 77).all()
    edge = np.zeros((20, 30), np.uint8)
    edge[:, 15:] = 255
    scaled = resize(edge, resized, name)
    assert abs(float(scaled.mean()) - 127.5) < 5
    assert (scaled[:, 0].max(), scaled[:, -1].min()) == (0, 255)


def test_centre_and_random_crops():
    placement = Placement((64, 64), (64, 99), 0.0)
    assert frame(placement).offset == (0, 17)
    offsets = {frame(placement, random_crop=True, rng=rng(n)).offset for n in range(300)}
    assert {left for left, _ in offsets} == {0}
    assert (min(top for _, top in offsets), max(top for _, top in offsets)) == (0, 35)


def test_mask_follows_its_image_exactly():
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 32:96] = 255
    framing = frame(Placement((64, 64), (128, 64), 0.0))
    assert mask_tensor(render(mask, framing, None)).mean() == 1.0


def test_tensor_range():
    tensor = image_tensor(np.array([[[0, 128, 255]]], np.uint8))
    assert tensor.shape == (3, 1, 1)
    assert torch.allclose(tensor.flatten(), torch.tensor([-1.0, 128 / 127.5 - 1, 1.0]), atol=1e-6)


def test_colour_augmentation_turns_hue_or_bends_tones():
    red = np.full((2, 2, 3), [200, 40, 40], np.uint8)
    changed = [images.augment_colour(red, rng(n))[0, 0] for n in range(300)]
    moved = [one for one in changed if one.tolist() != [200, 40, 40]]
    assert 0.2 < len(moved) / 300 < 0.42
    hues = [colorsys.rgb_to_hsv(*(one / 255))[0] for one in moved]
    turned = [min(hue, 1 - hue) for hue in hues]
    assert 0.02 < max(turned) <= 8.5 / 180
    bent = [one for one in moved if one[1] == one[2]]
    assert bent
    for one in bent:
        gamma = np.log(one[0] / 255) / np.log(200 / 255)
        assert 0.93 < gamma < 1.07


def test_flips_are_even_and_keyed():
    visits = [Visit("a", number) for number in range(400)]
    drawn = [images.flips(1, visit) for visit in visits]
    assert 150 < sum(drawn) < 250
    assert drawn == [images.flips(1, visit) for visit in visits]


def test_face_names(tmp_path):
    assert images.face_of(tmp_path / "me_too_120_80_60_64.png") == (120, 80, 60, 64)
    assert images.face_of(tmp_path / "120_80_60_64.png") is None
    assert images.face_of(tmp_path / "a_b_c_d_e.png") is None


@pytest.mark.parametrize("random_crop", [False, True])
def test_face_crop_stays_inside_and_keeps_the_face(random_crop):
    for number in range(60):
        framing = frame_face(
            (300, 150, 80, 100),
            size=(600, 400),
            bucket=(128, 128),
            face_range=(2.0, 4.0),
            random_crop=random_crop,
            rng=rng(number),
        )
        scale = framing.resized[0] / 600
        assert 128 / 400 - 1e-3 <= scale <= 128 / 200 + 1e-2
        assert all(0 <= at <= full - 128 for at, full in zip(framing.offset, framing.resized, strict=True))
        if not random_crop:
            left, top = framing.offset
            assert left <= 300 * scale <= left + 128
            assert top <= 150 * scale <= top + 128


def test_framing_of_the_whole_picture_changes_nothing():
    pixels = rng().integers(0, 256, (8, 9, 3), dtype=np.uint8)
    assert np.array_equal(render(pixels, Framing((9, 8), (0, 0), (9, 8)), None), pixels)
