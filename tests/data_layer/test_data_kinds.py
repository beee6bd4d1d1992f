"""Every kind of picture: what its header says, checked against Pillow, and what it looks like."""

from __future__ import annotations

import numpy as np
import pytest
from picture_kinds import KINDS, SIZE, Kind, display_p3, halves
from PIL import Image, ImageOps

from library.data import formats, headers
from library.data.decode import Undecodable, read_mask, read_picture
from library.data.headers import READ_ERRORS, read_header

ARE_READ_HERE = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.file)
def picture(request, tmp_path):
    kind: Kind = request.param
    suffix = formats.suffix_of(kind.file).lower()
    if suffix not in formats.readable():
        assert suffix in formats.OPTIONAL
        pytest.skip(f"nothing here reads {suffix}")
    kind.write(tmp_path / kind.file)
    return kind, tmp_path / kind.file


def test_header_is_what_pillow_says(picture):
    kind, path = picture
    header = read_header(path)
    with Image.open(path) as image:
        transparent = "A" in image.getbands() or "transparency" in image.info
        upright = ImageOps.exif_transpose(image) if kind.file != "noted.jxl" else image
    assert header == (upright.size, kind.orientation, transparent)
    assert header.size == SIZE
    assert header.alpha == (kind.alpha is not None)


def test_pixels_are_what_a_viewer_shows(picture):
    kind, path = picture
    seen = read_picture(path)
    assert seen.size == SIZE
    for at, colour in ((3, kind.left), (-4, kind.right)):
        column = seen.rgb[2:-2, at].astype(int)
        assert np.abs(column - colour).max() <= kind.tolerance, (column[0], colour)
    assert (seen.alpha is None) == (kind.alpha is None)
    if kind.alpha is not None:
        assert [int(seen.alpha[8, 3]), int(seen.alpha[8, -4])] == pytest.approx(kind.alpha, abs=2)


def test_plain_pictures_need_no_pillow(tmp_path, monkeypatch):
    plain = [
        kind
        for kind in KINDS
        if formats.suffix_of(kind.file).lower() in ARE_READ_HERE
        and not any(part in kind.file for part in ("a_", "text_exif", "xmp", "exif6.png", "exif6.webp"))
    ]
    for kind in plain:
        kind.write(tmp_path / kind.file)
    monkeypatch.setattr(headers, "_ask_pillow", lambda path: pytest.fail(f"{path} was given to Pillow"))
    assert {read_header(tmp_path / kind.file).size for kind in plain} == {SIZE}
    assert len(plain) > 25


def test_notes_before_the_frame_and_beyond_what_is_read(tmp_path):
    for length, name in ((60_000, "near.jpg"), (400_000, "far.jpg")):
        halves().save(tmp_path / name, comment=b"x" * 60_000, icc_profile=bytes(length))
        assert read_header(tmp_path / name).size == SIZE


def test_filling_between_the_segments_of_a_jpeg(tmp_path):
    path = tmp_path / "a.jpg"
    halves().save(path)
    whole = path.read_bytes()
    frame = whole.index(b"\xff\xc0")
    path.write_bytes(whole[:frame] + b"\xff\xff\xff" + whole[frame:])
    assert read_header(path).size == SIZE


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_a_cut_header_is_judged_as_pillow_judges_it(tmp_path, suffix):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    path = tmp_path / f"a.{suffix}"
    noise.save(path)
    whole = path.read_bytes()
    for length in (0, 1, 8, 12, 20, 26, 30, 33, 40, 60, 300, len(whole) - 20):
        path.write_bytes(whole[:length])
        try:
            with Image.open(path) as image:
                expected = image.size
        except READ_ERRORS:
            expected = None
        try:
            found = read_header(path).size
        except READ_ERRORS:
            found = None
        assert found == expected, length


def test_pixels_that_are_missing_are_named(tmp_path):
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(Undecodable, match=r"a\.png cannot be decoded"):
        read_picture(path)
    with pytest.raises(Undecodable, match=r"a\.png cannot be decoded"):
        read_mask(path)


def test_a_mask_is_neither_coloured_nor_laid_on_white(tmp_path):
    """A mask painted on a transparent layer weighs 0 where nothing was painted."""
    painted = halves("RGBA", (255, 255, 255, 255), (0, 0, 0, 0))
    painted.save(tmp_path / "layer.png")
    assert read_mask(tmp_path / "layer.png")[4, [2, -2]].tolist() == [255, 0]
    halves("RGB", (90, 90, 90), (10, 10, 10)).save(tmp_path / "wide.png", icc_profile=display_p3(1.0))
    assert read_mask(tmp_path / "wide.png")[4, [2, -2]].tolist() == [90, 10]
    Image.fromarray(np.full((16, 24), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert read_mask(tmp_path / "deep.png")[4, 2] == 128
