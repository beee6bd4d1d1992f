"""Reading a dataset_config file (.toml or .json) into tables whose keys and values are checked.

Fallbacks are not applied here. A dataset's kind follows from its subsets, as in Kohya: masks, metadata files,
or images in folders; one dataset has one kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from library.config.dataset_keys import (
    DATASET,
    FOLDER,
    GENERAL,
    MASKED,
    METADATA,
    NOT_OF_DATASETS,
    SUBSET,
    Place,
    check_kind,
    read_table,
)
from library.config.names import suggestion
from library.config.toml_file import KeyPath, key_lines, line_of, parse_toml, read_text
from library.config.train_config import OPTIONS
from library.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SubsetTable:
    """The keys written in one [[datasets.subsets]]."""

    values: Mapping[str, object]
    place: str


@dataclass(frozen=True, slots=True)
class DatasetTable:
    """The keys written in one [[datasets]], and its subsets."""

    values: Mapping[str, object]
    subsets: tuple[SubsetTable, ...]
    place: str


@dataclass(frozen=True, slots=True)
class DatasetFile:
    """A whole file."""

    general: Mapping[str, object]
    datasets: tuple[DatasetTable, ...]


def read_dataset_file(path: Path, *, masked_loss: bool) -> DatasetFile:
    """Read and check the file. Raises ConfigError naming file, table and key."""
    content, lines = _parse(path)
    return read_dataset_tables(content, path.name, lines=lines, masked_loss=masked_loss)


def read_dataset_tables(
    content: Mapping[str, Any],
    name: str,
    *,
    lines: Mapping[KeyPath, list[int]] = MappingProxyType({}),
    masked_loss: bool,
) -> DatasetFile:
    """Check the content of a dataset file. Raises ConfigError naming `name`, table, key, and its line if known."""
    for key in content:
        if key not in ("general", "datasets"):
            raise ConfigError(
                f"{name}{line_of(lines, (key,))}: {key!r} stands outside [general] and [[datasets]]"
                + (suggestion(key, ("general", "datasets")) or (NOT_OF_DATASETS if key in OPTIONS else ""))
            )
    place = Place(f"{name} {GENERAL}", ("general",), lines)
    general = read_table(_table(content.get("general", {}), str(place)), GENERAL, place)
    tables = _tables(content.get("datasets", []), f"{name}{line_of(lines, ('datasets',))}: datasets")
    if not tables:
        raise ConfigError(
            f"{name} has no [[datasets]]: add one with a [[datasets.subsets]] that names image_dir"
        )
    datasets = []
    for index, table in enumerate(tables):
        place = Place(f"{name} {DATASET} {index + 1}", ("datasets", index), lines)
        datasets.append(_dataset(table, place, masked_loss=masked_loss))
    return DatasetFile(general, tuple(datasets))


def _parse(path: Path) -> tuple[dict[str, Any], Mapping[KeyPath, list[int]]]:
    """The content, and the lines of its keys if it is TOML."""
    suffix = path.suffix.lower()
    if suffix == ".toml":
        text = read_text(path)
        return parse_toml(text, path), key_lines(text)
    if suffix != ".json":
        raise ConfigError(f"dataset_config {path}: the name must end with .toml or .json")
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} line {error.lineno}, column {error.colno}: this is not JSON ({error.msg})"
        ) from None
    return dict(_table(content, path.name)), {}


def _dataset(table: Mapping[str, Any], place: Place, *, masked_loss: bool) -> DatasetTable:
    own = {name: value for name, value in table.items() if name != "subsets"}
    values = read_table(own, DATASET, place)
    subsets: list[SubsetTable] = []
    places: list[Place] = []
    for index, subset in enumerate(_tables(table.get("subsets", []), f"{place}: subsets")):
        where = Place(f"{place.name}, subset {index + 1}", (*place.path, "subsets", index), place.lines)
        places.append(where)
        subsets.append(SubsetTable(read_table(subset, SUBSET, where), str(where)))
    if not subsets:
        raise ConfigError(f"{place} has no [[datasets.subsets]]: add one that names image_dir")
    kind = _kind(subsets, str(place), masked_loss=masked_loss)
    check_kind(values, kind, place)
    for item, where in zip(subsets, places, strict=True):
        check_kind(item.values, kind, where)
        if kind != METADATA and "image_dir" not in item.values:
            raise ConfigError(f"{item.place}: image_dir is missing: name the folder of the images")
    return DatasetTable(values, tuple(subsets), str(place))


def _kind(subsets: Sequence[SubsetTable], place: str, *, masked_loss: bool) -> str:
    masks = [subset.place for subset in subsets if "conditioning_data_dir" in subset.values]
    metadata = [subset.place for subset in subsets if "metadata_file" in subset.values]
    if masks and not masked_loss:
        raise ConfigError(
            f"{masks[0]}: conditioning_data_dir needs --masked_loss: set masked_loss, or remove the masks"
        )
    for given, name in ((masks, "conditioning_data_dir"), (metadata, "metadata_file")):
        if given and len(given) < len(subsets):
            raise ConfigError(
                f"{place}: {name} stands in some subsets only; "
                "put the others into a [[datasets]] of their own"
            )
    if masks:
        return MASKED
    return METADATA if metadata else FOLDER


def _table(value: object, place: str) -> Mapping[str, Any]:
    if isinstance(value, dict):
        return value
    raise ConfigError(f"{place} is not a table of keys")


def _tables(value: object, place: str) -> Sequence[Mapping[str, Any]]:
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    raise ConfigError(f"{place} must be an array of tables, written with double brackets")
