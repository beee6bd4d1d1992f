"""Folders and metadata files to records: against what Kohya's trainer recorded, and what is ours."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
from picture_files import golden, write_picture, write_tree

from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.data.buckets import bucket_info, centre_offset
from library.data.dataset import place_records
from library.data.discover import discover, tag_frequency
from library.data.plan import Plan, PlannedImage, PlanSettings
from library.errors import DatasetError

GOLDEN = golden("kohya_datasets")


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return write_tree(tmp_path_factory.mktemp("tree"))


def settings_of(recorded, root) -> DatasetSettings:
    sizes = {
        key: recorded[key]
        for key in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps")
        if recorded[key] is not None
    }
    subsets = tuple(
        SubsetSettings(
            image_dir=root / one["image_dir"].removeprefix("pictures/"),
            num_repeats=one["num_repeats"],
            is_reg=one["is_reg"],
            class_tokens=one["class_tokens"],
            caption_extension=one["caption_extension"],
            enable_wildcard=one["enable_wildcard"],
        )
        for one in recorded["subsets"]
    )
    return DatasetSettings(
        resolution=tuple(recorded["resolution"]),
        batch_size=recorded["batch_size"],
        enable_bucket=recorded["enable_bucket"],
        bucket_no_upscale=recorded["bucket_no_upscale"],
        subsets=subsets,
        **sizes,
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_recorded_datasets_come_out_alike(tree, name):
    datasets = tuple(settings_of(one, tree) for one in GOLDEN[name])
    found = discover(datasets, seed=0)
    placements = place_records(datasets, found.records)
    for index, recorded in enumerate(GOLDEN[name]):
        pairs = [
            (record, place)
            for record, place in zip(found.records, placements, strict=True)
            if record.dataset == index
        ]
        theirs = {"/".join(key.split("/")[-2:]): value for key, value in recorded["images"].items()}
        assert [record.key.split("/", 1)[1] for record, _ in pairs] == list(theirs)
        for record, place in pairs:
            wanted = theirs[record.key.split("/", 1)[1]]
            assert [list(record.size), list(place.bucket), list(place.resized)] == [
                wanted["size"],
                wanted["bucket"],
                wanted["resized"],
            ]
            assert list(centre_offset(place.resized, place.bucket)) == wanted["crop_xy"]
            assert (record.num_repeats, record.is_reg) == (wanted["repeats"], wanted["is_reg"])
            if recorded["subsets"][record.subset]["caption_extension"] == ".txt":
                assert record.caption == wanted["caption"]
        if recorded["bucket_info"] is not None:
            info = bucket_info((place, record.num_repeats) for record, place in pairs)
            assert info["buckets"] == recorded["bucket_info"]["buckets"]
            assert info["mean_img_ar_error"] == pytest.approx(recorded["bucket_info"]["mean_img_ar_error"])
        images = tuple(PlannedImage(r.key, 0, place.bucket, r.num_repeats) for r, place in pairs)
        options = PlanSettings(
            seed=0, batch_sizes=(recorded["batch_size"],), units_per_step=1, max_train_epochs=1
        )
        assert Plan(images, options).batches_per_epoch == recorded["batches_per_epoch"]


@pytest.mark.parametrize("name", ["folder_256_bucket", "dataset_toml"])
def test_recorded_tag_counts(tree, name):
    found = discover(tuple(settings_of(one, tree) for one in GOLDEN[name]), seed=0)
    theirs = {folder: tags for one in GOLDEN[name] for folder, tags in one["tag_frequency"].items()}
    assert tag_frequency(found) == theirs


def test_txt_captions_are_used_when_no_file_has_the_asked_extension(tree):
    recorded = GOLDEN["folder_no_bucket"][0]
    found = discover((settings_of(recorded, tree),), seed=0)
    captions = {record.key.split("/", 1)[1]: record.caption for record in found.records}
    assert captions["4_dot caption/c0.png"] == "from the dot caption 0"
    assert captions["3_sks dog/img00.png"] == "sks dog, running, grass, outdoors, daylight"
    assert any("has no .caption file" in notice and "3_sks dog" in notice for notice in found.notices)
    assert not any("has no .caption file" in notice and "4_dot" in notice for notice in found.notices)


def one_folder(folder, **options) -> tuple[DatasetSettings, ...]:
    subset = SubsetSettings(
        image_dir=folder, **{"caption_extension": ".txt", "class_tokens": "thing", **options}
    )
    return (DatasetSettings(resolution=(64, 64), subsets=(subset,)),)


def test_rotated_pictures_have_their_upright_size(tmp_path):
    write_picture(tmp_path / "a.jpg", (40, 20), orientation=6)
    (record,) = discover(one_folder(tmp_path), seed=0).records
    assert (record.size, record.orientation) == ((20, 40), 6)


def test_what_counts_as_an_image(tmp_path):
    for name in ["a.PNG", "b.jpeg", ".hidden.png", "c.gif", "d.txt", "e.Jpg", "sub/f.png", "g.avif", "h.bmp"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / name).write_text("x")
        else:
            write_picture(tmp_path / name, (20, 20))
    found = discover(one_folder(tmp_path), seed=0)
    assert [record.path.name for record in found.records] == ["a.PNG", "b.jpeg", "e.Jpg", "g.avif", "h.bmp"]
    assert any("e.Jpg are used too, which Kohya" in notice for notice in found.notices)
    assert any("1 .gif files, such as c.gif, are left out" in notice for notice in found.notices)


@pytest.mark.parametrize(
    ("content", "wildcard", "caption"),
    [
        (b"\xef\xbb\xbfa cat\nsecond\n", False, "a cat"),
        ("hälf\r\n\r\n  two  \r\n".encode(), True, "hälf\ntwo"),
        (b"\nsecond", False, ""),
        ("a\u2028b".encode(), False, "a\u2028b"),
        (b"x" * 65536, False, "x" * 65536),
        (b"x" * 200_000 + b"\rsecond", False, "x" * 200_000),
    ],
)
def test_caption_files(tmp_path, content, wildcard, caption):
    write_picture(tmp_path / "a.png", (20, 20))
    (tmp_path / "a.txt").write_bytes(content)
    (record,) = discover(one_folder(tmp_path, enable_wildcard=wildcard), seed=0).records
    assert record.caption == caption


def test_caption_files_can_be_left_aside(tmp_path):
    write_picture(tmp_path / "a.png", (20, 20))
    (tmp_path / "a.txt").write_text("a cat")
    found = discover(one_folder(tmp_path, caption_extension=".none"), seed=0)
    assert [record.caption for record in found.records] == ["thing"]
    assert not found.notices


def test_problems_are_listed_together(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(b"not an image")
    write_picture(tmp_path / "x.png", (20, 20))
    (tmp_path / "x.txt").write_bytes(b"")
    write_picture(tmp_path / "y.png", (20, 20))
    (tmp_path / "y.txt").write_bytes("ü".encode("latin-1"))
    (tmp_path / "empty").mkdir()
    subsets = (
        *one_folder(tmp_path)[0].subsets,
        SubsetSettings(class_tokens="thing", image_dir=tmp_path / "empty"),
    )
    with pytest.raises(DatasetError) as caught:
        discover((DatasetSettings(resolution=(64, 64), subsets=subsets),), seed=0)
    message = str(caught.value)
    assert "11 problems" in message
    assert "and 6 more" in message
    assert "x.txt is empty" in message
    assert "y.txt is not UTF-8" in message
    assert "\n" not in message


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DatasetError, match="nowhere cannot be read"):
        discover(one_folder(tmp_path / "nowhere"), seed=0)
    with pytest.raises(DatasetError, match="holds no image"):
        discover(one_folder(tmp_path), seed=0)
    write_picture(tmp_path / "a.png", (20, 20))
    with pytest.raises(DatasetError, match="no training image"):
        discover(one_folder(tmp_path, validation_split=1.0), seed=0)


def test_missing_captions_are_reported(tmp_path):
    for number in range(7):
        write_picture(tmp_path / f"{number}.png", (20, 20))
    (tmp_path / "0.txt").write_text("here")
    found = discover(one_folder(tmp_path, class_tokens="sks"), seed=0)
    assert [record.caption for record in found.records] == ["here"] + ["sks"] * 6
    (notice,) = found.notices
    assert "6 of 7 images" in notice
    assert '"sks"' in notice


def test_images_of_one_stem_get_cache_names_of_their_own(tmp_path):
    for name in ["a.png", "a.jpg", "b.png"]:
        write_picture(tmp_path / name, (20, 20))
    records = discover(one_folder(tmp_path), seed=0).records
    assert [os.path.basename(record.cache_base) for record in records] == ["a", "a.png", "b"]


def test_folders_of_one_name_have_different_keys(tmp_path):
    for parent in "xy":
        write_picture(tmp_path / parent / "pics" / "a.png", (20, 20))
    subsets = tuple(
        SubsetSettings(class_tokens="thing", image_dir=tmp_path / parent / "pics") for parent in "xy"
    )
    found = discover((DatasetSettings(resolution=(64, 64), subsets=subsets),), seed=0)
    assert [record.key for record in found.records] == ["0/pics/a.png", "0/pics/a.png#2"]


@pytest.mark.parametrize(
    ("images", "share", "held"), [(10, 0.2, 2), (7, 0.2, 1), (6, 0.25, 1), (10, 0.15, 1), (10, 0.3, 3)]
)
def test_validation_images_are_never_trained_on(tmp_path, images, share, held):
    for number in range(images):
        write_picture(tmp_path / "p" / f"{number}.png", (20, 20))
    subsets = (
        SubsetSettings(class_tokens="thing", image_dir=tmp_path / "p", num_repeats=3, validation_split=share),
    )
    one = DatasetSettings(resolution=(64, 64), subsets=subsets)
    found = discover((one, one), seed=1)
    training = {record.key for record in found.records}
    validation = {record.key for record in found.validation}
    assert not training & validation
    assert (len(training), len(validation)) == (2 * (images - held), 2 * held)
    assert {record.num_repeats for record in found.validation} == {1}
    by_dataset = [{r.path for r in found.validation if r.dataset == index} for index in (0, 1)]
    assert by_dataset[0] == by_dataset[1]
    other = discover((one, one), seed=2)
    again = discover((one, one), seed=1)
    assert found.validation == again.validation
    assert images < 10 or held < 2 or found.validation != other.validation


@pytest.mark.parametrize("case", golden("splits")["cases"], ids=lambda case: f"{case['n']}-{case['split']}")
def test_as_many_are_trained_on_as_in_the_reference_and_none_of_them_validates(tmp_path, case):
    """The reference rounds both parts on their own, so that one image can be in both; here the rest validates."""
    for number in range(case["n"]):
        write_picture(tmp_path / "p" / f"{number}.png", (20, 20))
    # One image of another folder, as a run that trains on nothing is refused.
    write_picture(tmp_path / "other" / "a.png", (20, 20))
    subsets = (
        SubsetSettings(
            class_tokens="thing", image_dir=tmp_path / "p", validation_split=case["split"],
            validation_seed=case["seed"],
        ),
        SubsetSettings(class_tokens="thing", image_dir=tmp_path / "other"),
    )  # fmt: skip
    found = discover((DatasetSettings(resolution=(64, 64), subsets=subsets),), seed=0)
    trained = [record.path for record in found.records if record.subset == 0]
    assert len(trained) == len(case["train"])
    assert len(found.validation) == case["n"] - len(case["train"])
    assert not {*trained} & {record.path for record in found.validation}


def test_subsets_are_split_apart_and_regularisation_is_not_held_back(tmp_path):
    for folder in "abr":
        for number in range(4):
            write_picture(tmp_path / folder / f"{number}.png", (20, 20))
    subsets = (
        SubsetSettings(class_tokens="thing", image_dir=tmp_path / "a", validation_split=0.5),
        SubsetSettings(class_tokens="thing", image_dir=tmp_path / "b", validation_split=0.0),
        SubsetSettings(class_tokens="thing", image_dir=tmp_path / "r", is_reg=True, validation_split=0.5),
    )
    found = discover((DatasetSettings(resolution=(64, 64), subsets=subsets),), seed=1)
    assert Counter(record.subset for record in found.validation) == {0: 2}
    assert sum(record.num_repeats for record in found.records if record.is_reg) == 6


def test_regularisation_beyond_the_need_is_left_out(tmp_path):
    write_picture(tmp_path / "t" / "a.png", (20, 20))
    for number in range(5):
        write_picture(tmp_path / "r" / f"{number}.png", (20, 20))
    subsets = (
        SubsetSettings(class_tokens="thing", image_dir=tmp_path / "r", is_reg=True, num_repeats=2),
        SubsetSettings(class_tokens="thing", image_dir=tmp_path / "t", num_repeats=3),
    )
    found = discover((DatasetSettings(resolution=(64, 64), subsets=subsets),), seed=0)
    assert [(r.path.name, r.num_repeats) for r in found.records] == [("a.png", 3), ("0.png", 2), ("1.png", 2)]
    assert any("3 of 5 regularisation images" in notice for notice in found.notices)


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_metadata_files(tmp_path, suffix):
    for name in ["a.png", "longer.png"]:
        write_picture(tmp_path / "p" / name, (20, 30))
    entries = {"a": {"caption": "one", "tags": "x, y"}, "longer.png": {"caption": "", "tags": "z"}}
    file = tmp_path / f"meta.{suffix}"
    lines = [json.dumps({"image_path": key, **value}) for key, value in entries.items()]
    file.write_text("\n".join(lines) if suffix == "jsonl" else json.dumps(entries))
    found = discover(one_folder(tmp_path / "p", metadata_file=file), seed=0)
    assert [(r.path.name, r.caption, r.size) for r in found.records] == [
        ("longer.png", "z", (20, 30)),
        ("a.png", "one,x, y", (20, 30)),
    ]
    assert tag_frequency(found) == {file.name: {"x": 1, "y": 1, "z": 1}}


def test_metadata_with_wildcards_puts_tags_on_every_line(tmp_path):
    write_picture(tmp_path / "a.png", (20, 30))
    file = tmp_path / "meta.json"
    file.write_text(json.dumps({"a.png": {"caption": "one\n\ntwo", "tags": "x\ny"}}))
    found = discover(one_folder(tmp_path, metadata_file=file, enable_wildcard=True), seed=0)
    assert found.records[0].caption == "one,x,y\ntwo,x,y"


def test_metadata_that_cannot_be_used(tmp_path):
    file = tmp_path / "meta.json"
    file.write_text('{"gone.png": {}}')
    with pytest.raises(DatasetError, match=r"gone\.png is named in"):
        discover(one_folder(tmp_path, metadata_file=file), seed=0)
    file.write_text("[1, 2]")
    with pytest.raises(DatasetError, match="object of objects"):
        discover(one_folder(tmp_path, metadata_file=file), seed=0)
    file.write_text("{")
    with pytest.raises(DatasetError, match="not JSON"):
        discover(one_folder(tmp_path, metadata_file=file), seed=0)


def test_masks_are_paired_by_stem_and_size(tmp_path):
    for name in "ab":
        write_picture(tmp_path / "p" / f"{name}.png", (20, 30))
        write_picture(tmp_path / "m" / f"{name}.jpg", (20, 30))
    records = discover(one_folder(tmp_path / "p", conditioning_data_dir=tmp_path / "m"), seed=0).records
    assert [record.mask_path.name for record in records] == ["a.jpg", "b.jpg"]
    write_picture(tmp_path / "m" / "b.jpg", (30, 30))
    write_picture(tmp_path / "m" / "c.jpg", (30, 30))
    write_picture(tmp_path / "p" / "d.png", (30, 30))
    with pytest.raises(DatasetError) as caught:
        discover(one_folder(tmp_path / "p", conditioning_data_dir=tmp_path / "m"), seed=0)
    for part in ["c.jpg is a mask without an image", "d.png has no mask", "b.jpg is (30, 30) pixels"]:
        assert part in str(caught.value)


def test_cache_info_spares_headers_but_not_captions(tmp_path):
    picture = write_picture(tmp_path / "a.png", (20, 30))
    (tmp_path / "a.txt").write_text("old")
    discover(one_folder(tmp_path, cache_info=True), seed=0)
    file = tmp_path / "metadata_cache.json"
    entry = json.loads(file.read_text())[str(picture)]
    assert (entry["caption"], entry["resolution"]) == ("old", [20, 30])
    (tmp_path / "a.txt").write_text("new")
    entry["resolution"] = [64, 48]
    file.write_text(json.dumps({str(picture): entry}))
    (record,) = discover(one_folder(tmp_path, cache_info=True), seed=0).records
    assert (record.caption, record.size) == ("new", (64, 48))
    write_picture(picture, (20, 31))
    (record,) = discover(one_folder(tmp_path, cache_info=True), seed=0).records
    assert record.size == (20, 31)
    kohyas = {str(picture): {"caption": "x", "resolution": [1, 1]}}
    file.write_text(json.dumps(kohyas))
    (record,) = discover(one_folder(tmp_path, cache_info=True), seed=0).records
    assert (record.caption, record.size) == ("new", (20, 31))
