"""From options to resolved datasets: a dataset_config file, a metadata file, or folders named N_name.

Folders are listed, images are not: that is the data layer's work. A zip file that stands for a folder is unpacked
under output_dir.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from library.config import dataset_rules
from library.config.archives import is_archive, unpacked
from library.config.dataset_file import DatasetTable, SubsetTable, read_dataset_file, read_dataset_tables
from library.config.dataset_keys import KEYS
from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.config.notices import Notices
from library.config.sections.dataset import DatasetConfig
from library.config.train_config import TrainConfig
from library.errors import ConfigError, DatasetError

# Enough to tell that a folder holds images; which files are used is decided where they are read.
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"})


def resolve_datasets(config: TrainConfig, *, notices: Notices | None = None) -> tuple[DatasetSettings, ...]:
    """The datasets of a run, every value resolved and checked.

    The tables of an imported config win over a dataset_config file, which wins over in_json, which wins over the
    folders, as in Kohya. What was left out or changed is said in `notices`. Raises ConfigError for a wrong value,
    DatasetError for a missing folder.
    """
    notices = notices if notices is not None else Notices()
    data = config.dataset
    if config.dataset_tables is not None:
        name = config.run.config_file.name if config.run.config_file else "config file"
        content = read_dataset_tables(config.dataset_tables, name, masked_loss=data.masked_loss)
        general, tables = content.general, content.datasets
    elif data.dataset_config is not None:
        content = read_dataset_file(data.dataset_config, masked_loss=data.masked_loss)
        general, tables = content.general, content.datasets
    elif data.in_json is not None:
        general, tables = {}, (_metadata_table(data),)
    else:
        general, tables = {}, (_folder_table(data, notices),)
    datasets = tuple(_resolve(config, general, table, notices) for table in tables)
    dataset_rules.check(config, datasets, [table.place for table in tables], notices)
    return datasets


def _resolve(
    config: TrainConfig, general: Mapping[str, object], table: DatasetTable, notices: Notices
) -> DatasetSettings:
    values = _fallback(config, _names(DatasetSettings), (table.values, general))
    if values["resolution"] is None:
        raise ConfigError(
            f"{table.place}: resolution is missing: set it there or as --resolution, such as 1024"
        )
    if "network_multiplier" in table.values or "network_multiplier" in general:
        notices.remarks.append(f"{table.place}: network_multiplier has no effect, as in Kohya's trainer")
    subsets = []
    seen: set[object] = set()
    for subset in table.subsets:
        settings = _subset(config, (subset.values, table.values, general), subset)
        identity = settings.metadata_file or settings.image_dir
        if settings.num_repeats < 1:
            notices.remarks.append(
                f"{subset.place}: num_repeats = {settings.num_repeats}, so {identity} is left out"
            )
        elif identity in seen:
            notices.remarks.append(
                f"{subset.place}: {identity} is given twice in one dataset; the second is left out"
            )
        else:
            subsets.append(settings)
            seen.add(identity)
    if not subsets:
        raise ConfigError(f"{table.place} has no subset with num_repeats of 1 or more")
    dataset = DatasetSettings(
        **values, prior_loss_weight=config.dataset.prior_loss_weight, subsets=tuple(subsets)
    )
    return _whole_steps(dataset, table.place, notices)


def _names(cls: type) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(cls) if item.name in KEYS)


def _subset(
    config: TrainConfig, levels: tuple[Mapping[str, object], ...], subset: SubsetTable
) -> SubsetSettings:
    values = _fallback(config, _names(SubsetSettings), levels)
    extension = values["caption_extension"]
    values["caption_extension"] = extension if extension.startswith(".") else f".{extension}"
    if values.get("is_reg"):  # they show what the trigger word does not mean
        values["trigger_word"] = subset.values.get("trigger_word")
    folder = values.get("image_dir")
    if folder is not None and is_archive(folder):
        values["image_dir"] = unpacked(folder, (config.saving.output_dir or folder.parent) / "images")
    settings = SubsetSettings(**values)
    for name, folder in (
        ("image_dir", settings.image_dir),
        ("conditioning_data_dir", settings.conditioning_data_dir),
    ):
        if folder is not None and not folder.is_dir():
            hint = "; here folders are separated by /" if "\\" in str(folder) and os.sep == "/" else ""
            raise DatasetError(f"{subset.place}: {name} {folder} is not a folder{hint}")
    if settings.metadata_file is not None and not settings.metadata_file.is_file():
        raise DatasetError(f"{subset.place}: metadata_file {settings.metadata_file} does not exist")
    return settings


def _fallback(
    config: TrainConfig, names: tuple[str, ...], levels: tuple[Mapping[str, object], ...]
) -> dict[str, Any]:
    """For each name the value of the first level that has it, else the option's; others are absent."""
    values: dict[str, Any] = {}
    for name in names:
        option = KEYS[name].fallback
        found = next((level[name] for level in levels if name in level), None)
        if found is not None:
            values[name] = found
        elif option is not None:
            values[name] = config.value(option)
    return values


def _whole_steps(settings: DatasetSettings, place: str, notices: Notices) -> DatasetSettings:
    """Buckets' limits rounded to multiples of the step: the lower down, the upper up, as in Kohya."""
    step = settings.bucket_reso_steps
    low = settings.min_bucket_reso // step * step
    high = -(-settings.max_bucket_reso // step) * step
    if not settings.enable_bucket or (low, high) == (settings.min_bucket_reso, settings.max_bucket_reso):
        return settings
    notices.remarks.append(
        f"{place}: bucket sides run from {low} to {high}, "
        f"as min_bucket_reso = {settings.min_bucket_reso} and "
        f"max_bucket_reso = {settings.max_bucket_reso} are rounded to multiples of bucket_reso_steps = {step}"
    )
    return replace(settings, min_bucket_reso=low, max_bucket_reso=high)


def _metadata_table(data: DatasetConfig) -> DatasetTable:
    masks = data.conditioning_data_dir if data.masked_loss else None
    folders = {"image_dir": data.train_data_dir, "conditioning_data_dir": masks}
    values: dict[str, object] = {name: folder for name, folder in folders.items() if folder is not None}
    return DatasetTable({}, (SubsetTable({"metadata_file": data.in_json, **values}, "in_json"),), "in_json")


def _folder_table(data: DatasetConfig, notices: Notices) -> DatasetTable:
    train, reg = data.train_data_dir, data.reg_data_dir
    if train is None:
        raise ConfigError(
            "no data: give train_data_dir (a folder with sub-folders such as 10_name) or dataset_config"
        )
    subsets = list(_folders(train, "train_data_dir", notices))
    if data.masked_loss and data.conditioning_data_dir is not None:
        subsets = _with_mask_folders(subsets, data.conditioning_data_dir)
    if reg is not None:
        subsets += _folders(reg, "reg_data_dir", notices)
    return DatasetTable({}, tuple(subsets), "train_data_dir")


def _with_mask_folders(subsets: Sequence[SubsetTable], masks: Path) -> list[SubsetTable]:
    """Each folder of images with the folder of its name in `masks`; a single one may have `masks` itself."""
    if not masks.is_dir():
        raise DatasetError(f"conditioning_data_dir {masks} is not a folder")
    named = [masks / Path(str(subset.values["image_dir"])).name for subset in subsets]
    if len(subsets) == 1 and not named[0].is_dir():
        named = [masks]
    missing = [folder.name for folder in named if not folder.is_dir()]
    if missing:
        raise DatasetError(
            f"conditioning_data_dir {masks} lacks {', '.join(missing[:5])}: "
            "put the masks into folders named as those of train_data_dir"
        )
    return [
        replace(subset, values={**subset.values, "conditioning_data_dir": folder})
        for subset, folder in zip(subsets, named, strict=True)
    ]


def _folders(base: Path, option: str, notices: Notices) -> Iterator[SubsetTable]:
    """One subset for each child folder `N_name`, N >= 1, sorted. Raises DatasetError when there is none."""
    if not base.is_dir():
        raise DatasetError(f"{option} {base} is not a folder")
    children = sorted(base.iterdir())
    images = [child for child in children if child.suffix.lower() in IMAGE_SUFFIXES and child.is_file()]
    ignored = []
    found = 0
    for child in (child for child in children if child.is_dir() and not child.name.startswith(".")):
        repeats, name = _split_name(child.name)
        if repeats < 1:
            ignored.append(child.name)
            continue
        found += 1
        values: dict[str, object] = {"image_dir": child, "num_repeats": repeats, "class_tokens": name}
        values["is_reg"] = option == "reg_data_dir"
        yield SubsetTable(values, f"{option} {child.name}")
    if not found and images:
        raise DatasetError(
            f"{option} {base} holds {len(images)} images "
            "itself: move them into a sub-folder named by repeats and "
            f"subject, such as {base / '10_name'}"
        )
    if not found:
        listed = f" (found {', '.join(ignored[:5])})" if ignored else ""
        raise DatasetError(
            f"{option} {base} has no sub-folder named by repeats and subject, such as 10_name{listed}"
        )
    if ignored:
        notices.remarks.append(
            f"{option} {base}: folders not named N_name with "
            f"N of 1 or more are left out: {', '.join(ignored)}"
        )
    if images:
        notices.remarks.append(
            f"{option} {base}: {len(images)} images beside the N_name folders are left out"
        )


def _split_name(name: str) -> tuple[int, str]:
    """Repeats and the rest of a folder name `N_name`; 0 repeats when it does not begin with a number."""
    first, _, rest = name.partition("_")
    try:
        return int(first), rest
    except ValueError:
        return 0, name
