"""[run] The config file, and what to do with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Config file and dry run."""

    config_file: Path | None = option(
        None, "TOML file with options, or another trainer's config; the command line overrides it"
    )
    output_config: bool = option(False, "write the options of the command line to config_file and stop")
    dry_run: bool = option(
        False, "check everything, print the resolved options and the plan, and stop", ours=True
    )
    strict_config: bool = option(False, "treat ignored keys and options without effect as errors", ours=True)
