"""From the command line to a checked TrainConfig: defaults, launcher, the file, then the command line.

Reads the config file and looks whether named files exist; opens no model and imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from library.config import rules
from library.config.cli import Given, parse
from library.config.config_file import config_path, read_config_file
from library.config.implied import apply_implications
from library.config.importers.recognise import import_file
from library.config.importers.report import remarks
from library.config.launcher import launcher_options
from library.config.loaded import LoadedConfig
from library.config.notices import Notices, refuse
from library.config.options import UNSET, Option
from library.config.strangers import place_strangers
from library.config.train_config import OPTIONS, TrainConfig
from library.errors import ConfigError


def load_config(argv: Sequence[str]) -> LoadedConfig:
    """Read `argv` (without the program's name) and the config file it names, and check the whole.

    With --output_config only the command line is read and nothing is checked across options, as they are
    about to be written, not used: see `show.output_config`. Raises ConfigError.
    """
    notices = Notices()
    values, sources, tables = read_options(argv, notices)
    config = TrainConfig.from_values(values, dataset_tables=tables)
    if not config.run.output_config:
        rules.check(config, sources, notices)
    if config.run.strict_config:
        refuse(notices.all())
    return LoadedConfig(
        config, notices.all(), MappingProxyType({name: sources.get(name, "default") for name in OPTIONS})
    )


def read_options(
    argv: Sequence[str], notices: Notices
) -> tuple[dict[str, object], dict[str, str], Mapping[str, object] | None]:
    """Values and sources of the options that `argv` and its config file give or imply, each checked alone.

    A config of another program may also give dataset tables, as of a dataset_config file.
    """
    given, tables = parse(argv, notices), None
    if "config_file" in given:
        path = config_path(str(given["config_file"].raw))
        given["config_file"] = Given(str(path), given["config_file"].place)
        if "output_config" not in given:
            given, tables = _with_file(path, given, notices)
    if "output_config" not in given:
        given = {**launcher_options(os.environ, given, notices), **given}
    values, sources = read_values(given, notices)
    apply_implications(values, sources, notices)
    return values, sources, tables


def _with_file(
    path: Path, given: Mapping[str, Given], notices: Notices
) -> tuple[dict[str, Given], Mapping[str, object] | None]:
    """What the config file gives beneath `given`: options and, if it is another program's, dataset tables."""
    if path.suffix.lower() == ".toml":
        content = read_config_file(path, notices)
        both = {**content.options, **given}
        place_strangers(content.strangers, both, notices)
        return both, None
    imported = import_file(path)
    notices.remarks.extend(remarks(imported, path.name))
    options = {
        name: Given(value, f"{path.name} {imported.origins[name]}")
        for name, value in imported.options.items()
    }
    named = [name for name in ("dataset_config", "in_json", "train_data_dir") if name in given]
    if imported.dataset is None or not named:
        return {**options, **given}, imported.dataset
    notices.remarks.append(f"--{named[0]} names the data, so the datasets of {path.name} are ignored")
    return {**options, **given}, None


def read_values(given: Mapping[str, Given], notices: Notices) -> tuple[dict[str, object], dict[str, str]]:
    """Converted values and sources of the given options; those left blank are absent. Raises ConfigError."""
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    idle: dict[str, list[str]] = {}  # reason -> options without effect
    for name, item in given.items():
        option = OPTIONS[name]
        value = _read(option, item)
        if value is UNSET:
            continue
        values[name], sources[name] = value, item.place
        if option.row.effect.state == "none" and not option.row.effect.quiet and value != option.row.default:
            idle.setdefault(option.row.effect.reason, []).append(name)
    notices.remarks.extend(f"No effect: {', '.join(names)} ({reason})" for reason, names in idle.items())
    return values, sources


def _read(option: Option, item: Given) -> object:
    """The converted value or UNSET. A wrong value of an option without effect is let go."""
    effect = option.row.effect
    try:
        value = option.read(item.raw, item.place)
    except ConfigError:
        if effect.state == "none":
            return UNSET
        raise
    reason = effect.refused_values.get(str(value), "")
    if effect.state == "refused" and value not in (UNSET, option.row.default):
        reason = effect.reason
    if reason:
        raise ConfigError(f"{option.said(item.raw, item.place)}: {reason}")
    return value
