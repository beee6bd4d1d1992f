"""Datasets from folders, metadata files and dataset files: fallbacks, refusals, remarks."""

import json
from pathlib import Path

import pytest

from library.config.dataset_keys import KEYS
from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.config.datasets import resolve_datasets
from library.config.notices import Notices
from library.config.train_config import TrainConfig
from library.errors import ConfigError, DatasetError

FOLDERS = json.loads((Path(__file__).parents[1] / "data/config/folder_names.json").read_text())


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def resolve(tmp_path, images):
    """Resolve the dataset file with this text; IMAGES stands for a folder that exists."""

    def run(text, *, notices=None, name="data.toml", **options):
        path = tmp_path / name
        path.write_text(text.replace("IMAGES", images.as_posix()), encoding="utf-8")
        config = TrainConfig.from_values({"dataset_config": path, **options})
        return resolve_datasets(config, notices=notices)

    return run


def dataset(general="", own="", subset=""):
    return (
        f"[general]\n{general}\n[[datasets]]\nresolution = 512\n{own}\n"
        f"[[datasets.subsets]]\nimage_dir = 'IMAGES'\n{subset}\n"
    )


def test_every_key_lands_in_a_setting():
    fields = set(DatasetSettings.__dataclass_fields__) | set(SubsetSettings.__dataclass_fields__)
    assert set(KEYS) - fields == {"network_multiplier"}
    assert fields - set(KEYS) == {"subsets", "prior_loss_weight", "rejoin_tags"}


@pytest.mark.parametrize(
    ("general", "own", "subset", "expected"),
    [
        ("", "", "", 4),
        ("keep_tokens = 3", "", "", 3),
        ("keep_tokens = 3", "keep_tokens = 2", "", 2),
        ("keep_tokens = 3", "keep_tokens = 2", "keep_tokens = 1", 1),
        ("keep_tokens = 3", "keep_tokens = 2", "keep_tokens = 0", 0),
    ],
)
def test_subset_beats_dataset_beats_general_beats_option(resolve, general, own, subset, expected):
    (settings,) = resolve(dataset(general, own, subset), keep_tokens=4)
    assert settings.subsets[0].keep_tokens == expected


def test_empty_text_and_false_stop_the_search(resolve):
    text = dataset("caption_prefix = 'a'\nflip_aug = true", "", "caption_prefix = ''\nflip_aug = false")
    (settings,) = resolve(text, caption_prefix="b", shuffle_caption=True)
    subset = settings.subsets[0]
    assert (subset.caption_prefix, subset.flip_aug, subset.shuffle_caption) == ("", False, True)


def test_cached_captions_that_change_are_told_once(resolve):
    notices = Notices()
    options = {"cache_text_encoder_outputs": True, "cache_text_encoder_outputs_to_disk": True}
    resolve(dataset("shuffle_caption = true"), notices=notices, **options, text_cache_variants=5)
    assert notices.advice == [
        "[caption-variants] text encoder outputs are cached, so an image has 5 captions at most by "
        "shuffle_caption; text_cache_variants changes that",
        "[caption-variants-seed] each seed draws other captions by shuffle_caption, and seed is not given: give "
        "one, and the next run finds its text encoder outputs cached",
    ]
    quiet = Notices()
    resolve(dataset("caption_dropout_rate = 0.5"), notices=quiet, **options)
    assert quiet.advice == []


def test_regularisation_images_have_a_trigger_word_only_of_their_own(resolve, images):
    text = dataset("trigger_word = 'a'")
    for number, own in enumerate(("", "trigger_word = 'b'")):
        (images / f"{number}").mkdir()
        text += f"[[datasets.subsets]]\nimage_dir = 'IMAGES/{number}'\nis_reg = true\n{own}\n"
    words = [subset.trigger_word for subset in resolve(text, trigger_word="c")[0].subsets]
    assert words == ["a", None, "b"]


def test_options_stand_in_under_their_own_names(resolve):
    options = {"train_batch_size": 3, "dataset_repeats": 2, "alpha_mask": True, "validation_split": 0.25}
    (settings,) = resolve(dataset(), prior_loss_weight=0.5, caption_extension="txt", **options)
    assert settings.batch_size == 3
    assert settings.prior_loss_weight == 0.5
    assert settings.resolution == (512, 512)
    assert settings.validation_split == 0.25
    subset = settings.subsets[0]
    assert (subset.num_repeats, subset.alpha_mask, subset.caption_extension) == (2, True, ".txt")
    assert subset.class_tokens is None


def test_a_json_file_is_read_like_toml(resolve, images):
    subset = {"image_dir": str(images), "class_tokens": "cat", "face_crop_aug_range": [1, 2.5]}
    content = {
        "datasets": [{"resolution": [512, 768], "subsets": [{**subset, "custom_attributes": {"a": 1}}]}]
    }
    (settings,) = resolve(json.dumps(content), name="data.JSON")
    assert settings.resolution == (512, 768)
    assert settings.subsets[0].face_crop_aug_range == (1.0, 2.5)
    assert settings.subsets[0].custom_attributes == {"a": 1}


def test_a_file_with_byte_order_mark(tmp_path, images):
    path = tmp_path / "data.toml"
    path.write_text(dataset().replace("IMAGES", images.as_posix()), encoding="utf-8-sig")
    assert len(resolve_datasets(TrainConfig.from_values({"dataset_config": path}))) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            dataset("min_bucket_resolution = 1"),
            "data.toml [general] (line 2): unknown key 'min_bucket_resolution'; did you mean",
        ),
        (
            dataset("", "reslution = 1"),
            "data.toml [[datasets]] 1 (line 5): unknown key 'reslution'; did you mean 'resolution'?",
        ),
        (
            dataset("", "", "num_repeat = 1"),
            "[[datasets]] 1, subset 1 (line 8): unknown key 'num_repeat'; did you mean 'num_repeats'",
        ),
        (
            dataset("", "image_directory = 'x'"),
            "belongs to musubi-tuner's dataset files; here it is image_dir",
        ),
        (
            dataset("alpha_mask = true"),
            "alpha_mask cannot stand in [general]; it belongs into [[datasets.subsets]]",
        ),
        (
            dataset("", "", "resolution = 1"),
            "resolution cannot stand in [[datasets.subsets]]; it belongs into [general]",
        ),
        (dataset("", "", "num_repeats = 'x'"), "subset 1 (line 8): num_repeats = 'x' is not a whole number"),
        (dataset("", "batch_size = true"), "batch_size = True is not a whole number"),
        (dataset("", "batch_size = 0"), "batch_size = 0 must be >= 1"),
        (dataset("", "", "caption_dropout_rate = 2"), "must be >= 0 and <= 1"),
        (dataset("", "", "conditioning_data_dir = 'm'"), "conditioning_data_dir needs --masked_loss"),
        (dataset("", "", "image_dir2 = 'm'"), "did you mean 'image_dir'?"),
        ("seed = 1\n" + dataset(), "'seed' stands outside [general] and [[datasets]]"),
        ("[[dataset]]\n", "'dataset' stands outside [general] and [[datasets]]; did you mean 'datasets'?"),
        ("[general]\n", "has no [[datasets]]"),
        ("[[datasets]]\nresolution = 512\n", "[[datasets]] 1 (line 1) has no [[datasets.subsets]]"),
        ("[datasets]\nresolution = 512\n", "must be an array of tables"),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1\n", "image_dir is missing"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'IMAGES'\n", "resolution is missing"),
        ("[[datasets]]\nx = \n", "line 2"),
        (dataset("", "", "num_repeats = 0"), "no subset with num_repeats of 1 or more"),
        (dataset("", "", "is_reg = true"), "regularisation images only"),
        (
            dataset() + "[[datasets.subsets]]\nmetadata_file = 'm.json'\n",
            "metadata_file stands in some subsets only",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(resolve, text, message):
    with pytest.raises(ConfigError) as caught:
        resolve(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metadata_files_know_no_regularisation(tmp_path):
    meta = tmp_path / "m.json"
    meta.write_text("{}")
    text = f"[[datasets]]\nresolution=512\n[[datasets.subsets]]\nmetadata_file='{meta.as_posix()}'\n"
    path = tmp_path / "data.toml"
    path.write_text(text)
    config = TrainConfig.from_values({"dataset_config": path})
    (settings,) = resolve_datasets(config)
    assert settings.subsets[0].metadata_file == meta
    assert settings.subsets[0].image_dir is None
    path.write_text(text + "is_reg = true\n")
    with pytest.raises(
        ConfigError, match="is_reg cannot be used with metadata files, only with images in folders"
    ):
        resolve_datasets(config)
    meta.unlink()
    path.write_text(text)
    with pytest.raises(DatasetError, match="does not exist"):
        resolve_datasets(config)


def test_masks_come_with_masked_loss(resolve, images):
    text = dataset("", "", f"conditioning_data_dir = '{images.as_posix()}'")
    (settings,) = resolve(text, masked_loss=True)
    assert settings.subsets[0].conditioning_data_dir == images
    with pytest.raises(ConfigError, match="random_crop cannot be used with mask images"):
        resolve(text, masked_loss=True, random_crop=True)
    notices = Notices()
    resolve(dataset(), notices=notices, masked_loss=True)
    assert notices.remarks[0].startswith("masked_loss has no effect")


def test_masks_of_folders_lie_in_folders_of_the_same_names(tmp_path):
    for name in ("data/2_cat", "data/3_dog", "reg/1_animal", "masks/2_cat", "masks/3_dog", "one/5_cat"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "meta.json").write_text("{}")
    masks, options = tmp_path / "masks", {"resolution": (512, 512), "masked_loss": True}

    def found(**changes):
        values = {"conditioning_data_dir": masks, **options, **changes}
        (settings,) = resolve_datasets(TrainConfig.from_values(values))
        return [subset.conditioning_data_dir for subset in settings.subsets]

    both = {"train_data_dir": tmp_path / "data", "reg_data_dir": tmp_path / "reg"}
    assert found(**both) == [masks / "2_cat", masks / "3_dog", None]
    assert found(**both, masked_loss=False) == [None, None, None]
    # A single folder may have its masks in conditioning_data_dir itself, as a metadata file has.
    assert found(train_data_dir=tmp_path / "one") == [masks]
    assert found(train_data_dir=tmp_path / "one", in_json=tmp_path / "meta.json") == [masks]
    (masks / "5_cat").mkdir()
    assert found(train_data_dir=tmp_path / "one") == [masks / "5_cat"]
    (masks / "3_dog").rmdir()
    with pytest.raises(DatasetError, match="lacks 3_dog: put the masks into folders named as those"):
        found(**both)
    with pytest.raises(DatasetError, match="nowhere is not a folder"):
        found(**both, conditioning_data_dir=tmp_path / "nowhere")


def test_a_missing_folder_and_a_wrong_ending(resolve, tmp_path):
    with pytest.raises(DatasetError, match="image_dir nowhere is not a folder"):
        resolve("[[datasets]]\nresolution=512\n[[datasets.subsets]]\nimage_dir='nowhere'\n")
    with pytest.raises(ConfigError, match=r"must end with .toml or .json"):
        resolve(dataset(), name="data.yaml")
    with pytest.raises(ConfigError, match="line 1, column 2: this is not JSON"):
        resolve("{]", name="data.json")


def test_left_out_subsets_are_named(resolve, images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    text = dataset()
    text += "[[datasets.subsets]]\nimage_dir = 'IMAGES'\n"
    text += f"[[datasets.subsets]]\nimage_dir = '{other.as_posix()}'\nnum_repeats = 0\n"
    notices = Notices()
    (settings,) = resolve(text, notices=notices)
    assert [subset.image_dir for subset in settings.subsets] == [images]
    assert notices.remarks == [
        f"data.toml [[datasets]] 1, subset 2 (line 9): {images} is given twice in one dataset; the second is left out",
        f"data.toml [[datasets]] 1, subset 3 (line 11): num_repeats = 0, so {other} is left out",
    ]


@pytest.mark.parametrize(
    ("own", "options", "message"),
    [
        ("", {"resolution": (520, 512)}, None),  # the file's own 512 counts
        (
            "bucket_reso_steps = 24",
            {"enable_bucket": True},
            "bucket_reso_steps = 24 must be a multiple of 16",
        ),
        ("min_bucket_reso = 576", {"enable_bucket": True}, "min_bucket_reso = 576 is above the shorter side"),
        ("max_bucket_reso = 448", {"enable_bucket": True}, "max_bucket_reso = 448 is below the longer side"),
        ("max_bucket_reso = 448", {"enable_bucket": True, "bucket_no_upscale": True}, None),
        (
            "batch_size = 3",
            {"global_batch_size": 8},
            "global_batch_size = 8 must be a multiple of the batch size, 3",
        ),
        ("batch_size = 4", {"global_batch_size": 8}, None),
        ("color_aug = true", {"cache_latents": True}, "color_aug cannot be used with cache_latents"),
        ("random_crop = true", {"cache_latents": True}, "random_crop cannot be used with cache_latents"),
        ("shuffle_caption = true", {"cache_text_encoder_outputs": True}, None),
        ("token_warmup_step = 5", {"cache_text_encoder_outputs": True}, None),
        ("caption_tag_dropout_rate = 0.1", {"cache_text_encoder_outputs": True}, None),
        ("trigger_word = 'ohwx, man'", {}, "trigger_word = 'ohwx, man' must be a single tag"),
        ("trigger_word = ' ohwx'", {}, "has blanks around it"),
        ("caption_dropout_rate = 0.1", {"cache_text_encoder_outputs": True}, None),
        ("shuffle_caption = true\ncolor_aug = true", {}, None),
    ],
)
def test_rules_over_datasets(resolve, own, options, message):
    if message is None:
        assert resolve(dataset("", own), **options)
        return
    with pytest.raises(ConfigError) as caught:
        resolve(dataset("", own), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("own", "options", "remarks"),
    [
        ('face_crop_aug_range = "2,4"', {}, []),
        (
            'face_crop_aug_range = "2,4"',
            {"enable_bucket": True, "cache_latents": True},
            [
                "data.toml [[datasets]] 1 (line 3): face_crop_aug_range has no effect with enable_bucket",
                "data.toml [[datasets]] 1 (line 3): face_crop_aug_range has no effect with cache_latents",
            ],
        ),
        (
            "custom_attributes = {diff_output_preservation = true, weight = 2}",
            {},
            ["custom_attributes without effect: weight"],
        ),
    ],
)
def test_dataset_keys_that_do_nothing_are_named(resolve, own, options, remarks):
    notices = Notices()
    resolve(dataset("", own), notices=notices, **options)
    assert len(notices.remarks) == len(remarks)
    assert all(said.endswith(wanted) for said, wanted in zip(notices.remarks, remarks, strict=True))


def test_validation_without_images_is_named(resolve):
    notices = Notices()
    resolve(dataset("", "validation_split = 0.2"), notices=notices, validate_every_n_steps=5)
    assert notices.remarks == []
    resolve(dataset(), notices=notices, validate_every_n_steps=5)
    assert notices.remarks == [
        "without validation_split nothing is validated, so ignored: validate_every_n_steps"
    ]


def test_sizes_without_buckets_are_multiples_of_16(resolve):
    with pytest.raises(ConfigError, match="resolution 520x512 must be a multiple of 16"):
        resolve(dataset().replace("resolution = 512", "resolution = [520, 512]"))


def test_bucket_limits_are_rounded_as_in_kohya(resolve):
    notices = Notices()
    own = "enable_bucket = true\nmin_bucket_reso = 300\nmax_bucket_reso = 1000"
    (settings,) = resolve(dataset("", own), notices=notices)
    assert (settings.min_bucket_reso, settings.max_bucket_reso) == (256, 1024)
    assert "bucket sides run from 256 to 1024" in notices.remarks[0]


def folder_config(base, **options):
    return TrainConfig.from_values({"train_data_dir": base, "resolution": (512, 512), **options})


def test_folders_named_by_repeats_become_subsets(tmp_path):
    for name in (
        "train/3_red_cat",
        "train/10",
        "train/2_dog",
        "train/0_off",
        "train/notes",
        "train/.cache",
        "reg/1_cat",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "train/cover.PNG").touch()
    notices = Notices()
    config = folder_config(tmp_path / "train", reg_data_dir=tmp_path / "reg", shuffle_caption=True)
    (settings,) = resolve_datasets(config, notices=notices)
    found = [
        (s.image_dir.name, s.num_repeats, s.class_tokens, s.is_reg, s.shuffle_caption)
        for s in settings.subsets
    ]
    assert found == [
        ("10", 10, "", False, True),
        ("2_dog", 2, "dog", False, True),
        ("3_red_cat", 3, "red_cat", False, True),
        ("1_cat", 1, "cat", True, True),
    ]
    assert notices.remarks == [
        f"train_data_dir {tmp_path / 'train'}: folders not named N_name with N of 1 or more are left out: "
        "0_off, notes",
        f"train_data_dir {tmp_path / 'train'}: 1 images beside the N_name folders are left out",
    ]


def test_folders_that_cannot_be_used_say_how_to_name_them(tmp_path, images):
    with pytest.raises(DatasetError, match="is not a folder"):
        resolve_datasets(folder_config(tmp_path / "none"))
    with pytest.raises(
        DatasetError, match=r"no sub-folder named by repeats and subject, such as 10_name \(found images\)"
    ):
        resolve_datasets(folder_config(tmp_path))
    (images / "a.webp").touch()
    with pytest.raises(DatasetError, match=r"holds 1 images itself: move them into a sub-folder .*10_name"):
        resolve_datasets(folder_config(images))
    (images / "1_a").mkdir()
    with pytest.raises(ConfigError, match="train_data_dir: resolution is missing"):
        resolve_datasets(folder_config(images, resolution=None))


def test_in_json_is_one_subset_of_metadata(tmp_path, images):
    meta = tmp_path / "meta.json"
    meta.write_text("{}")
    (settings,) = resolve_datasets(folder_config(images, in_json=meta, dataset_repeats=4))
    (subset,) = settings.subsets
    assert (subset.image_dir, subset.metadata_file, subset.num_repeats) == (images, meta, 4)


def test_folder_names_are_read_as_the_reference_read_them(tmp_path):
    for name in FOLDERS["present"]:
        (tmp_path / "train" / name).mkdir(parents=True)
    (settings,) = resolve_datasets(folder_config(tmp_path / "train"))
    read = [
        {"folder": s.image_dir.name, "num_repeats": s.num_repeats, "class_tokens": s.class_tokens}
        for s in settings.subsets
    ]
    assert read == FOLDERS["subsets"]
