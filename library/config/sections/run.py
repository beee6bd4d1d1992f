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
    dry_run_json: str | None = option(
        None, "write the dry run as JSON to this file, - for the screen; implies dry_run", ours=True
    )
    strict_config: bool = option(
        False, "treat everything there is to say about a config as an error", ours=True
    )
    ignore_advice: tuple[str, ...] = option(
        (),
        "codes of advice not to give, such as flux-guidance,flux-shift; docs/advice.md lists them",
        ours=True,
    )

    @property
    def ignored_codes(self) -> frozenset[str]:
        """The codes of ignore_advice, given as several words, with commas, or both."""
        return frozenset(
            code.strip() for text in self.ignore_advice for code in text.split(",") if code.strip()
        )
