"""The keys of a dataset_config file: where each may stand, for which kind of data, what it falls back on.

A value is taken from the subset, else its dataset, else [general], else the option of the command line. An
empty text is a value and stops the search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from library.config.names import did_you_mean, nearest, suggestion
from library.config.options import UNSET, Limit, Option, Row
from library.config.toml_file import KeyPath, line_of
from library.config.train_config import OPTIONS
from library.errors import ConfigError

GENERAL, DATASET, SUBSET = "[general]", "[[datasets]]", "[[datasets.subsets]]"
FOLDER, METADATA, MASKED = "images in folders", "metadata files", "mask images"
ALL_KINDS = (FOLDER, METADATA, MASKED)
EVERYWHERE = (GENERAL, DATASET, SUBSET)
UPPER = (GENERAL, DATASET)
NOT_OF_DATASETS = ", which is an option: give it in config_file or on the command line"
MUSUBI = {
    "image_directory": "image_dir",
    "image_jsonl_file": "metadata_file",
    "cache_directory": "",
    "control_directory": "conditioning_data_dir",
    "video_directory": "",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key: its reader, the tables it may stand in, and the kinds of data that know it."""

    reader: Option
    fallback: str | None  # the option that stands in
    levels: tuple[str, ...]
    kinds: tuple[str, ...] = ALL_KINDS


def _own(name: str, kind: str, levels: tuple[str, ...], kinds: tuple[str, ...] = ALL_KINDS) -> Key:
    """A key that no option stands in for."""
    row = Row(default=None, help="")
    return Key(Option(name=name, section="dataset", type=kind, row=row), None, levels, kinds)


def _like(name: str, levels: tuple[str, ...], kinds: tuple[str, ...] = ALL_KINDS, option: str = "") -> Key:
    """A key that means the same as an option and falls back on it. Zero is a value here."""
    known = OPTIONS[option or name]
    row = dataclasses.replace(known.row, unset=())
    if name == "resize_interpolation":
        row = dataclasses.replace(row, choices=(*row.choices, "box"))
    if name == "num_repeats":
        row = dataclasses.replace(row, limit=Limit())  # below 1 leaves the subset out
    return Key(dataclasses.replace(known, name=name, row=row), known.name, levels, kinds)


_PLAIN = (
    *("shuffle_caption", "caption_separator", "keep_tokens", "keep_tokens_separator", "secondary_separator"),
    *("enable_wildcard", "trigger_word", "caption_prefix", "caption_suffix", "caption_dropout_rate"),
    *("caption_dropout_every_n_epochs", "caption_tag_dropout_rate", "token_warmup_min", "token_warmup_step"),
    *("color_aug", "flip_aug", "face_crop_aug_range", "random_crop", "resize_interpolation"),
    *("validation_split", "validation_seed"),
)
_BUCKETS = ("enable_bucket", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
_KEYS = (
    _like("batch_size", UPPER, option="train_batch_size"),
    _like("resolution", UPPER),
    *(_like(name, UPPER) for name in _BUCKETS),
    _like("skip_image_resolution", UPPER),
    _own("network_multiplier", "float", UPPER),
    _like("num_repeats", EVERYWHERE, option="dataset_repeats"),
    *(_like(name, EVERYWHERE) for name in _PLAIN),
    _own("custom_attributes", "Mapping[str, object]", EVERYWHERE),
    _like("caption_extension", EVERYWHERE, (FOLDER, MASKED)),
    _like("cache_info", EVERYWHERE, (FOLDER, MASKED)),
    _own("class_tokens", "str", EVERYWHERE, (FOLDER,)),
    _own("image_dir", "Path", (SUBSET,)),
    _own("is_reg", "bool", (SUBSET,), (FOLDER,)),
    _like("alpha_mask", (SUBSET,), (FOLDER, METADATA)),
    _own("metadata_file", "Path", (SUBSET,), (METADATA,)),
    _own("conditioning_data_dir", "Path", (SUBSET,), (MASKED,)),
)
KEYS: Mapping[str, Key] = MappingProxyType({key.reader.name: key for key in _KEYS})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a table is, for messages: `data.toml [[datasets]] 1 (line 7)`."""

    name: str  # without the line
    path: KeyPath
    lines: Mapping[KeyPath, list[int]]  # of the whole file; empty if it is not TOML

    def __str__(self) -> str:
        return self._with(line_of(self.lines, self.path))

    def of(self, key: str) -> str:
        """The place of one of the table's keys."""
        return self._with(line_of(self.lines, (*self.path, key)))

    def _with(self, line: str) -> str:
        return f"{self.name} ({line.strip()})" if line else self.name


def read_table(table: Mapping[str, object], level: str, whole: Place) -> dict[str, object]:
    """The converted values of one table, keys left blank absent. Raises ConfigError naming the place."""
    values = {}
    for name, raw in table.items():
        place = whole.of(name)
        key = KEYS.get(name)
        if key is None:
            raise ConfigError(_unknown(name, level, place))
        if level not in key.levels:
            where = " or ".join(key.levels)
            raise ConfigError(f"{place}: {name} cannot stand in {level}; it belongs into {where}")
        blank_text = raw == "" and key.reader.type == "str" and not key.reader.row.choices
        value = raw if blank_text and name != "caption_extension" else key.reader.read(raw, place)
        if value is not UNSET:
            values[name] = value
    return values


def check_kind(values: Mapping[str, object], kind: str, place: Place) -> None:
    """Raise ConfigError for a key that this kind of data does not know."""
    for name in values:
        kinds = KEYS[name].kinds
        if kind not in kinds:
            raise ConfigError(
                f"{place.of(name)}: {name} cannot be used with {kind}, only with {' or '.join(kinds)}"
            )


def _unknown(name: str, level: str, place: str) -> str:
    if name in MUSUBI:
        ours = MUSUBI[name]
        hint = f"here it is {ours} in {SUBSET}" if ours else "there is no such key here"
        return f"{place}: {name} belongs to musubi-tuner's dataset files; {hint}"
    here = [key for key in KEYS if level in KEYS[key].levels] + ["subsets"] * (level == DATASET)
    if near := nearest(name, here):
        return f"{place}: unknown key {name!r}{did_you_mean(near)}"
    hint = NOT_OF_DATASETS if name in OPTIONS else ""
    return f"{place}: unknown key {name!r}{hint}" + suggestion(name, KEYS)
