"""The TOML file of options: all tables flattened one level, as Kohya reads it. Values are not converted here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.config.cli import Given
from library.config.kinds import local_path
from library.config.names import files_near
from library.config.notices import Notices
from library.config.options import shown
from library.config.toml_file import KeyPath, key_lines, line_of, parse_toml, read_text
from library.config.train_config import OPTIONS
from library.errors import ConfigError

OTHER_PROGRAMS = (".json", ".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """What a file gives, in its order: for options, and under other names."""

    options: dict[str, Given]
    strangers: dict[str, Given]


def config_path(name: str) -> Path:
    """The file that --config_file names; `.toml` may be left out. Files of other programs have other endings.

    Raises ConfigError for a folder.
    """
    path = local_path(name)
    if path.suffix.lower() in (*OTHER_PROGRAMS, ".toml"):
        return path
    if path.is_dir() and not path.with_name(f"{path.name}.toml").exists():
        raise ConfigError(
            f"--config_file {name} is a folder: name the file in it{files_near(path / 'config.toml')}"
        )
    with_suffix = path.with_name(f"{path.name}.toml")
    return path if path.is_file() and not with_suffix.exists() else with_suffix


def read_config_file(path: Path, notices: Notices) -> ConfigFile:
    """Read the file; of a key given in two tables the later counts. Raises ConfigError if it is missing or broken."""
    text = read_text(path)
    content = ConfigFile({}, {})
    for key, value in _entries(parse_toml(text, path), key_lines(text), path.name):
        target = content.options if key in OPTIONS else content.strangers
        if key in target and target[key].raw != value.raw:
            earlier = f"{shown(key, target[key].raw)} ({target[key].place})"
            notices.remarks.append(
                f"{key} is given twice: {earlier}, then {shown(key, value.raw)} ({value.place}), which counts"
            )
        target[key] = value
    return content


def _entries(
    tables: dict[str, Any], lines: dict[KeyPath, list[int]], file: str
) -> Iterator[tuple[str, Given]]:
    """Each key with its value and place, tables dissolved one level."""
    for name, value in tables.items():
        if not isinstance(value, dict):
            yield name, Given(value, file + line_of(lines, (name,)))
            continue
        for key, entry in value.items():
            yield key, Given(entry, f"{file} [{name}]{line_of(lines, (name, key))}")
