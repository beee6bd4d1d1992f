"""Every key of a dataset_config file in every table, for every kind of data, against Kohya's schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toml

from library.config.dataset_keys import FOLDER, KEYS, MASKED, METADATA
from library.config.dataset_settings import SubsetSettings
from library.config.datasets import resolve_datasets
from library.config.notices import Notices
from library.config.train_config import TrainConfig
from library.errors import ConfigError

SCHEMA = json.loads((Path(__file__).parents[1] / "data/config/kohya_dataset_keys.json").read_text())["keys"]
KINDS = {"dreambooth": FOLDER, "finetuning": METADATA, "controlnet": MASKED}
LEVELS = ("subset", "dataset", "general")  # in the order in which they are asked
OWN = {
    "image_dir",
    "metadata_file",
    "conditioning_data_dir",
    "is_reg",
}  # stand in a subset only, no fall-back
# Keys that Kohya's trainer has not, or only in newer versions (skip_image_resolution), and where they stand.
OURS = {"skip_image_resolution": ["general", "dataset"], "trigger_word": list(LEVELS)}
# Values for subset, dataset, general and the command line where those of the type will not do.
VALUES = {
    "resolution": (512, 768, 1024, 1280),
    "min_bucket_reso": (64, 128, 192, 256),
    "max_bucket_reso": (2048, 2112, 2176, 2240),
    "bucket_reso_steps": (16, 32, 48, 64),
    "caption_extension": (".a", ".b", ".c", ".d"),
    "resize_interpolation": ("area", "cubic", "lanczos", "nearest"),
    "face_crop_aug_range": ([1.0, 2.0], [1.0, 3.0], [1.0, 4.0], [1.0, 5.0]),
    "skip_image_resolution": ([8, 8], 16, [24, 32], 40),
    "custom_attributes": ({"a": 1}, {"a": 2}, {"a": 3}, {"a": 4}),
}
BY_TYPE = {
    "bool": (True, False, True, False),
    "str": ("a", "b", "c", "d"),
    "int": (1, 2, 3, 4),
    "float": (0.1, 0.2, 0.3, 0.4),
}


@pytest.fixture
def resolve(tmp_path):
    """Resolve a file of one dataset of this kind with these tables and options."""
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "meta.json").write_text("{}")

    def run(kind, *, general=(), dataset=(), subset=(), notices=None, **options):
        own = {"image_dir": str(tmp_path / "images")}
        if kind == "finetuning":
            own["metadata_file"] = str(tmp_path / "meta.json")
        if kind == "controlnet":
            own["conditioning_data_dir"] = str(tmp_path / "masks")
        tables = {
            "general": dict(general),
            "datasets": [{**dict(dataset), "subsets": [{**own, **dict(subset)}]}],
        }
        path = tmp_path / "data.toml"
        path.write_text(toml.dumps(tables))
        options = {"resolution": (512, 512), "masked_loss": kind == "controlnet", **options}
        config = TrainConfig.from_values({"dataset_config": path, **options})
        return resolve_datasets(config, notices=notices)[0]

    return run


def values_of(name: str, kind: str):
    if name == "random_crop" and kind == "controlnet":
        return (False,) * 4  # cannot be used with masks, in Kohya either
    kinds = KEYS[name].reader.type.removesuffix(" | None").split(" | ")
    return VALUES.get(name) or BY_TYPE["float" if "float" in kinds else kinds[0]]


def read(settings, name: str):
    return getattr(settings.subsets[0] if name in SubsetSettings.__dataclass_fields__ else settings, name)


def as_read(name: str, value):
    if name in ("resolution", "skip_image_resolution") and isinstance(value, int):
        return (value, value)
    return tuple(value) if isinstance(value, list) else value


def test_keys_are_kohyas_and_ours():
    assert set(KEYS) == set(SCHEMA) | set(OURS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", sorted(set(SCHEMA) - OWN))
def test_a_key_may_stand_where_kohya_allows_it(resolve, name, level, kind):
    known = SCHEMA[name]
    # In [general] a key may stand for the datasets of another kind.
    allowed = level in known["levels"] and (level == "general" or kind in known["dataset_kinds"])
    more = name in ("validation_split", "validation_seed") and level == "subset"
    table = {level: {name: values_of(name, kind)[0]}}
    if allowed or more:
        settings = resolve(kind, **table)
        if name != "network_multiplier" and kind in known["dataset_kinds"]:
            assert read(settings, name) == as_read(name, table[level][name])
    else:
        with pytest.raises(ConfigError, match=name):
            resolve(kind, **table)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(set(KEYS) - OWN - {"network_multiplier"}))
def test_the_nearest_table_wins_and_the_option_comes_last(resolve, name, kind):
    ours = {"levels": OURS.get(name), "dataset_kinds": list(KINDS), "cli_fallback": name}
    known = SCHEMA.get(name, ours)
    if kind not in known["dataset_kinds"]:
        pytest.skip(f"{kind} does not know {name}")
    values = values_of(name, kind)
    option = known["cli_fallback"]
    assert KEYS[name].fallback == option
    options = {}
    if option:
        raw = as_read(name, values[3])
        options = {option: raw}
    tables = {
        level: {name: value} for level, value in zip(LEVELS, values, strict=False) if level in known["levels"]
    }
    for level in LEVELS:
        if level in tables:
            assert read(resolve(kind, **tables, **options), name) == as_read(name, tables[level][name])
            del tables[level]
    left = read(resolve(kind, **options), name)
    assert left == (as_read(name, values[3]) if option else SubsetSettings.__dataclass_fields__[name].default_factory()
                    if name == "custom_attributes" else known["default"])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(OWN))
def test_keys_of_one_subset(resolve, tmp_path, name, kind):
    for level in ("general", "dataset"):
        with pytest.raises(ConfigError, match=f"{name} cannot stand in"):
            resolve(kind, **{level: {name: False if name == "is_reg" else "x"}})
    if name == "is_reg" and kind != "dreambooth":
        with pytest.raises(ConfigError, match="is_reg cannot be used with"):
            resolve(kind, subset={"is_reg": False})


@pytest.mark.parametrize("level", ["general", "dataset"])
def test_network_multiplier_is_said_to_do_nothing(resolve, level):
    notices = Notices()
    resolve("dreambooth", notices=notices, **{level: {"network_multiplier": 0.5}})
    assert any("network_multiplier has no effect" in said for said in notices.all())
