"""Where a report lies, and what makes a page one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from library.train.naming import last_stem

REPORT_SUFFIX = ".report.html"


def report_path(output_dir: Path, output_name: str | None) -> Path:
    """`<output_dir>/<output_name>.report.html`."""
    return output_dir / f"{last_stem(output_name)}{REPORT_SUFFIX}"


def is_report(content: Mapping[str, object]) -> bool:
    """Whether a page's content is that of one run's report."""
    return content.get("kind") == "report"
