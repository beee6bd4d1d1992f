"""Looking into folders: sizes that are remembered, problems told together, and a dry run over many pictures."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from picture_files import write_picture

from flux_train_network import main
from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.data import formats, size_cache
from library.data.dataset import place_records
from library.data.discover import discover
from library.data.headers import Header
from library.data.problems import Problems
from library.data.scan import list_folder, read_headers
from library.data.size_cache import Noted
from library.errors import DatasetError
from tools.bench_scan import write_config, write_tree


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder of this test's own, in which small folders are remembered too."""
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(size_cache, "FEWEST", 2)
    return tmp_path / "cache" / "image-sizes"


@pytest.fixture
def folder(tmp_path) -> Path:
    for number in range(3):
        write_picture(tmp_path / "p" / f"{number}.png", (20 + number, 30))
    return tmp_path / "p"


def headers_of(folder: Path) -> dict[str, tuple[int, int]]:
    problems = Problems()
    found = read_headers(folder, list_folder(folder).images, problems)
    problems.check()
    return {name: header.size for name, header in found.items()}


def replace_quietly(path: Path, content: bytes, *, time: int | None = None) -> None:
    """Other bytes of the same length and, unless `time` is given, the same time."""
    status = path.stat()
    path.write_bytes(content.ljust(status.st_size, b"\0")[: status.st_size])
    os.utime(path, ns=(time or status.st_mtime_ns,) * 2)


def test_remembered_headers_are_not_read_again_unless_the_file_changed(folder, cache):
    first = headers_of(folder)
    assert first == {"0.png": (20, 30), "1.png": (21, 30), "2.png": (22, 30)}
    replace_quietly(folder / "1.png", b"not opened")
    assert headers_of(folder) == first
    replace_quietly(folder / "1.png", b"opened", time=1)
    with pytest.raises(DatasetError, match=r"1\.png is damaged or not an image"):
        headers_of(folder)
    write_picture(folder / "1.png", (33, 44))
    write_picture(folder / "3.png", (55, 66))
    (folder / "0.png").unlink()
    changed = {"1.png": (33, 44), "2.png": (22, 30), "3.png": (55, 66)}
    assert headers_of(folder) == headers_of(folder) == changed
    (file,) = cache.glob("*.json")
    assert set(json.loads(file.read_text())["images"]) == set(changed)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"version": 0}',
        b'{"version": 1}',
        b'{"version": 1, "images": {"0.png": [1]}}',
        b"\xff",
    ],
)
def test_a_damaged_memory_is_ignored_and_made_anew(folder, cache, content):
    expected = headers_of(folder)
    (file,) = cache.glob("*.json")
    good = file.read_bytes()
    file.write_bytes(content)
    assert headers_of(folder) == expected
    assert file.read_bytes() == good


def test_where_nothing_can_be_remembered_nothing_fails(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(size_cache, "FEWEST", 2)
    assert len(headers_of(folder)) == 3


def test_small_folders_are_not_worth_a_file(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "cache"))
    headers_of(folder)
    assert not (tmp_path / "cache").exists()


def test_memory_is_bounded_and_the_least_recently_used_goes_first(cache, tmp_path, monkeypatch):
    noted = {f"{number}.png": Noted((1, 2), Header((3, 4))) for number in range(5)}
    folders = [tmp_path / name for name in "abc"]
    for folder in folders[:2]:
        size_cache.write(folder, noted)
    os.utime(size_cache.file_of(folders[0]), ns=(1, 1))
    os.utime(size_cache.file_of(folders[1]), ns=(2, 2))
    assert size_cache.read(folders[0], 5) == noted  # now used more recently
    monkeypatch.setattr(size_cache, "MOST_BYTES", int(2.5 * size_cache.file_of(folders[0]).stat().st_size))
    size_cache.write(folders[2], noted)
    assert [bool(size_cache.read(folder, 5)) for folder in folders] == [True, False, True]


def test_writers_at_one_time_leave_a_whole_file(cache, tmp_path):
    def work(writer: int) -> bool:
        noted = {f"{n}.png": Noted((writer, n), Header((writer, writer))) for n in range(1, 50)}
        for _ in range(20):
            size_cache.write(tmp_path, noted)
            found = size_cache.read(tmp_path, 50)
            if len(found) != 49 or len({one.stamp[0] for one in found.values()}) != 1:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(1, 5)))
    assert [path.suffix for path in cache.iterdir()] == [".json"]


def test_two_metadata_files_over_one_folder_do_not_forget_each_other_s_images(folder, cache):
    for names in (["0.png", "1.png"], ["1.png", "2.png"]):
        read_headers(folder, names, Problems())
    (file,) = cache.glob("*.json")
    assert sorted(json.loads(file.read_text())["images"]) == ["0.png", "1.png", "2.png"]


def settings(folder: Path, dataset=None, **options) -> tuple[DatasetSettings, ...]:
    subset = SubsetSettings(image_dir=folder, class_tokens="thing", caption_extension=".txt", **options)
    return (DatasetSettings(**{"resolution": (64, 64), **(dataset or {})}, subsets=(subset,)),)


def test_what_is_wrong_with_files_is_said_plainly(folder):
    (folder / "0.png").write_bytes(b"")
    (folder / "1.png").write_bytes(b"text")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:40])
    with pytest.raises(DatasetError) as caught:
        discover(settings(folder), seed=0)
    said = str(caught.value)
    assert "0.png cannot be read as an image (the file is empty)" in said
    assert "1.png is damaged or not an image that can be read" in said
    assert "2.png" in said
    assert "3 problems" in said


def test_pictures_below_a_bucket_step_are_all_named(tmp_path):
    for number in range(7):
        write_picture(tmp_path / f"{number}.png", (40, 900))
    write_picture(tmp_path / "fine.png", (64, 64))
    rule = {"enable_bucket": True, "bucket_no_upscale": True}
    data = settings(tmp_path, rule)
    with pytest.raises(DatasetError) as caught:
        place_records(data, discover(data, seed=0).records)
    assert "7 problems" in str(caught.value)
    assert "0.png is an image of 40x900 pixels" in str(caught.value)
    assert "smaller in one axis than bucket_reso_steps=64" in str(caught.value)
    assert "and 2 more" in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "advice"), [("jxl", "pip install pillow-jxl-plugin"), ("avif", "pillow>=11.3")]
)
def test_kinds_that_need_a_plug_in_are_named_with_it(tmp_path, monkeypatch, suffix, advice):
    monkeypatch.setattr(formats, "readable", lambda: frozenset(formats.ALWAYS))
    for name in (f"a.{suffix}", f"b.{suffix.upper()}"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DatasetError, match=re.escape(advice)):
        discover(settings(tmp_path), seed=0)
    write_picture(tmp_path / "c.png", (64, 64))
    notices = discover(settings(tmp_path), seed=0).notices
    assert any(f"2 .{suffix} files, such as a.{suffix}, are left out" in n and advice in n for n in notices)


def test_transparency_is_told_once_with_its_count(tmp_path):
    for name in "abc":
        write_picture(tmp_path / f"{name}.png", (64, 64), mode="RGBA" if name < "c" else "RGB")
    two = settings(tmp_path) * 2
    (told,) = discover(two, seed=0).asides
    assert "2 images have an alpha channel (a.png, b.png)" in told
    masked = discover(settings(tmp_path, alpha_mask=True), seed=0)
    assert not [said for said in (*masked.notices, *masked.asides) if "alpha" in said]
    for name in "ab":
        (tmp_path / f"{name}.png").unlink()
    (told,) = (n for n in discover(settings(tmp_path, alpha_mask=True), seed=0).notices if "alpha" in n)
    assert "alpha_mask masks nothing" in told


def test_images_of_one_stem_are_told(tmp_path):
    for name in ["a.png", "a.jpg", "b.png", "b.webp", "c.png"]:
        write_picture(tmp_path / name, (64, 64))
    (tmp_path / "a.txt").write_text("shared")
    found = discover(settings(tmp_path), seed=0)
    assert any(notice.endswith("a.jpg and a.png, b.png and b.webp") for notice in found.notices)
    assert [record.caption for record in found.records[:2]] == ["shared"] * 2


def test_images_of_too_few_pixels_are_skipped(tmp_path):
    for name, size in {"a": (64, 64), "b": (32, 128), "c": (65, 64), "d": (300, 20)}.items():
        write_picture(tmp_path / f"{name}.png", size)
    found = discover(settings(tmp_path, {"skip_image_resolution": (64, 64)}), seed=0)
    assert [record.path.stem for record in found.records] == ["c", "d"]
    assert found.subsets[0].num_images == 2
    assert any("2 of 4 images are left out at resolution 64x64" in notice for notice in found.notices)
    with pytest.raises(DatasetError, match=r"no training image; .*skip_image_resolution"):
        discover(settings(tmp_path, {"skip_image_resolution": (512, 512)}), seed=0)


def test_skipping_does_not_move_images_between_training_and_validation(tmp_path):
    for number in range(20):
        write_picture(tmp_path / f"{number}.png", (64, 60 + number))
    low, high = (
        settings(tmp_path, validation_split=0.3)[0],
        settings(
            tmp_path, {"resolution": (128, 128), "skip_image_resolution": (64, 70)}, validation_split=0.3
        )[0],
    )
    found = discover((low, high), seed=3)
    trained = {record.path for record in found.records}
    assert not trained & {record.path for record in found.validation}
    assert {record.dataset for record in found.validation} == {0, 1}
    assert sum(record.dataset == 1 for record in (*found.records, *found.validation)) == 9


def test_a_dry_run_over_many_pictures(tmp_path, monkeypatch, capsys):
    """The sizes are those of the headers, cold and warm; what it costs is measured by tools/bench_scan.py."""
    monkeypatch.setenv("COLUMNS", "200")
    sizes = write_tree(tmp_path / "data", 2000)
    folders = sorted((tmp_path / "data").iterdir())
    remembered = [size_cache.file_of(folder) for folder in folders]
    config = write_config(tmp_path / "config.toml", tmp_path / "data")

    def dry_run(*options: str) -> str:
        assert main(["--config_file", str(config), "--dry_run", *options]) == 0
        # Other programs fill the disk, and empty it, meanwhile.
        return re.sub(r"[\d.]+ .?B free", "SIZE free", capsys.readouterr().out)

    try:
        cold = dry_run()
        assert all(file.is_file() for file in remembered)
        assert dry_run() == cold
        assert re.search(r"images +2000 used, 5500 an epoch with repeats", cold)
        many = dry_run("--bucket_no_upscale", "--bucket_reso_steps", "16")
        subsets = tuple(SubsetSettings(image_dir=folder, caption_extension=".txt") for folder in folders)
        found = discover((DatasetSettings(resolution=(1024, 1024), subsets=subsets),), seed=0)
    finally:
        for file in remembered:
            file.unlink(missing_ok=True)
    assert {str(r.path.relative_to(tmp_path / "data")): r.size for r in found.records} == sizes
    assert found.records[0].caption.endswith("number 0")
    rows = re.findall(r"^ +(?:1 +\d+x\d+|\d+ smaller) +(\d+) +(\d+) +\d+", many, flags=re.MULTILINE)
    assert len(rows) == 61
    assert [sum(int(row[column]) for row in rows) for column in (0, 1)] == [2000, 5500]
