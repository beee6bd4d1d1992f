"""The resolved options as a table, and as the text of a config file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, cast

from library.config.effects import effect_of
from library.config.loaded import LoadedConfig
from library.config.options import SECRETS
from library.config.toml_file import toml_value
from library.config.train_config import OPTIONS
from library.errors import ConfigError

NOT_WRITTEN = SECRETS | {"config_file", "output_config", "dry_run", "dry_run_json", "strict_config"}


class ResolvedOption(NamedTuple):
    """One line of what --dry_run prints."""

    section: str
    name: str
    value: str
    source: str
    state: str  # "used", "none" or "refused"
    effect: str  # what it makes the run do, in words; "" if nothing is asked of it


def resolved_table(loaded: LoadedConfig) -> list[ResolvedOption]:
    """Every option with its value, its source and its effect, by section. Secrets are masked."""
    rows = []
    for name, value in loaded.config.flat().items():
        shown = "***" if name in SECRETS and value else _shown(value)
        item = OPTIONS[name]
        effect = effect_of(name, shown, loaded.config)
        rows.append(
            ResolvedOption(item.section, name, shown, loaded.sources[name], item.row.effect.state, effect)
        )
    return rows


def _shown(value: object) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(_shown(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def output_config(loaded: LoadedConfig) -> tuple[Path, str]:
    """The file that --output_config asks for and its text: a flat TOML of what differs from the defaults.

    The caller writes it. Secrets and the options of `run` are left out. Raises ConfigError when
    --config_file is missing or the file exists.
    """
    path = loaded.config.run.config_file
    if path is None:
        raise ConfigError("--output_config needs --config_file: name the file to write")
    if path.exists():
        raise ConfigError(f"--output_config: {path} exists; remove it or name another file as --config_file")
    lines = [
        f"{name} = {_written(name, value)}\n"
        for name, value in loaded.config.flat().items()
        if value != OPTIONS[name].row.default
        and name not in NOT_WRITTEN
        and not loaded.sources[name].startswith("implied")
    ]
    return path, "".join(lines)


def _written(name: str, value: object) -> str:
    """The value in TOML, of Kohya's type: sizes and ranges are texts there."""
    if OPTIONS[name].type in ("tuple[int, int]", "tuple[float, float]"):
        value = ",".join(str(item) for item in cast("tuple[object, ...]", value))
    return toml_value(value)
