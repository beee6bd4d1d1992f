"""The report of a dry run: options, forecast and notices as one value, and as JSON."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import library
from library.config.loaded import LoadedConfig
from library.config.notices import code_of
from library.config.options import SECRETS
from library.config.show import resolved_table
from library.errors import ConfigError
from library.files.atomic import write_text
from library.preflight.facts import Forecast


@dataclass(frozen=True, slots=True)
class Report:
    """All that a dry run has to tell."""

    loaded: LoadedConfig
    forecast: Forecast
    notices: tuple[str, ...]


def report_json(report: Report) -> str:
    """The report as JSON: options with typed values, the forecast's facts by name, notices with their codes."""
    values = report.loaded.config.flat()
    content = {
        "trainer": f"polyrank/{library.__version__}",
        "options": [
            {
                "name": row.name,
                "section": row.section,
                "value": "***" if row.name in SECRETS and values[row.name] else values[row.name],
                "source": row.source,
                "state": row.state,
                "effect": row.effect,
            }
            for row in resolved_table(report.loaded)
        ],
        **dataclasses.asdict(report.forecast),
        "notices": [{"code": code_of(notice), "text": notice} for notice in report.notices],
    }
    content["trained"]["parameters"] = report.forecast.trained.parameters
    return json.dumps(content, indent=1, default=_plain) + "\n"


def write_report(report: Report, target: str) -> None:
    """Write the JSON to the file `target`; "-" is standard output."""
    text = report_json(report)
    if target == "-":
        sys.stdout.write(text)
        return
    path = Path(target).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"dry_run_json: {path} cannot be written ({error.strerror}); name another file"
        ) from error


def _plain(value: Any) -> str:
    assert isinstance(value, Path), f"{type(value).__name__} has no form in JSON"
    return str(value)
