"""A page over several runs, made from their reports or, where there is none, from their logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.errors import ConfigError
from library.files.atomic import write_text
from library.files.refusals import refusals_named
from library.report.content import Composer, Known
from library.report.page import content_of, render
from library.report.paths import REPORT_SUFFIX, is_report
from library.train.run_log import LOG_SUFFIX, read_log

KEPT = ("run", "options", "charts", "samples")


def write_comparison(runs: Sequence[Path], page: Path) -> None:
    """Write the page. ConfigError when a run cannot be found or the page cannot be written."""
    found = [find_run(path) for path in runs]
    contents = [run_content(path) for path in found]
    names = _names(found, [str(content["run"]["name"]) for content in contents])
    content = {
        "runs": [
            {**{key: one[key] for key in KEPT}, "name": name}
            for one, name in zip(contents, names, strict=True)
        ]
    }
    html = render(content, kind="compare", title=f"{' · '.join(names)} - comparison")
    with refusals_named(page):
        write_text(page, html)


def find_run(path: Path) -> Path:
    """The report or log that `path` is or, as a folder, holds."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; name a report, a run's log or its output_dir")
    for suffix in (REPORT_SUFFIX, LOG_SUFFIX):
        inside = sorted(path.glob(f"*{suffix}"))
        if len(inside) > 1:
            listed = ", ".join(one.name for one in inside)
            raise ConfigError(f"{path} holds several runs ({listed}); name one of these files")
        if inside:
            return inside[0]
    raise ConfigError(f"{path} holds neither a report (*{REPORT_SUFFIX}) nor a run log (*{LOG_SUFFIX})")


def run_content(path: Path) -> dict[str, Any]:
    """What a report holds, or would hold."""
    if path.name.endswith(LOG_SUFFIX):
        name = path.name.removesuffix(LOG_SUFFIX)
        lines = read_log(path)
        if not lines:
            raise ConfigError(f"{path} holds no line of a run log")
        return Composer(Known(name=name, folder=path.parent, output_name=_given_name(name))).content(lines)
    content = content_of(path)
    if not is_report(content):
        raise ConfigError(f"{path} is a page, but no report of a run")
    return content


def _given_name(name: str) -> str | None:
    """The output_name of a log's stem; a run without one is called "last", and its samples have no prefix."""
    return None if name == "last" else name


def _names(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Names that tell the runs apart: with the folder where two are alike, with a number where that does not."""
    alike = Counter(names)
    longer = [
        f"{path.resolve().parent.name}/{name}" if alike[name] > 1 else name
        for path, name in zip(paths, names, strict=True)
    ]
    again = Counter(longer)
    return [f"{name} ({n})" if again[name] > 1 else name for n, name in enumerate(longer, start=1)]
