"""The report of a dry run on a screen: tables that fit 80 columns, grow with the screen, and never wrap when piped."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from library.config.notices import code_of
from library.preflight.facts import FileFacts, Forecast
from library.preflight.options_table import show_options
from library.preflight.report import Report
from library.preflight.rows import cache_rows, plan_rows, schedule_rows
from library.preflight.words import moment_text, size_text

UNWRAPPED = 10_000  # columns of a file: tables take what they need
SHOWN_BUCKETS = 60  # rows, the largest; the JSON report has all
SHOWN_FILES, LAST_FILES = 20, 10  # rows, of which so many are the run's last; the JSON report has all


def print_report(report: Report) -> None:
    """Show the report on standard output; a file gets it without the spaces that fill table cells."""
    console = Console(highlight=False)
    if console.is_terminal:
        show_report(report, console)
        return
    wide = Console(highlight=False, width=UNWRAPPED, file=io.StringIO())
    with wide.capture() as captured:
        show_report(report, wide)
    for line in captured.get().splitlines():
        console.out(line.rstrip(), highlight=False)


def show_report(report: Report, console: Console) -> None:
    """Print everything: options, data, plan, what is trained and written, advice."""
    facts = report.forecast
    console.print(Text("Options", style="bold cyan"))
    show_options(report.loaded, console)
    parts: list[tuple[str, RenderableType]] = [
        ("Folders", _folders(facts)),
        ("Buckets of an epoch", _buckets(facts)),
        ("Plan", _pairs(plan_rows(facts))),
        ("Trained", _trained(facts)),
        ("Caches", _pairs(cache_rows(facts))),
        ("Files", _files(facts)),
        ("Beside training", _pairs(schedule_rows(facts))),
        ("Advice", _notices(report.notices)),
    ]
    for title, content in parts:
        console.print(Text(title, style="bold cyan"))
        console.print(Padding(content, (0, 0, 1, 2), expand=False))
    console.print("Nothing was loaded, trained or written.")


def _folders(facts: Forecast) -> Group:
    """What lies in each folder, and below it each one's first caption as it is encoded."""
    table = _table("set", "folder", "#images", "#repeats", "#held back", "#captions", "#empty", "#longest")
    for folder in facts.folders:
        name = folder.name + (" (regularisation)" if folder.kind == "regularisation" else "")
        table.add_row(
            str(folder.dataset), Text(name), str(folder.images), str(folder.repeats), _some(folder.validation),
            str(folder.captions), _some(folder.empty), f"{folder.longest} letters",
        )  # fmt: skip
    captions = [(f"  {folder.name}", f'"{folder.example}"') for folder in facts.folders]
    return Group(table, _pairs([("first caption of", ""), *captions]))


def _buckets(facts: Forecast) -> Table:
    """The buckets in ascending order; of very many the largest, and one row for the others."""
    table = _table(
        "set", "size", "#images", "#with repeats", "#batches", "#last one", "#enlarged", "#cut off at most"
    )
    largest = sorted(facts.buckets, key=lambda bucket: bucket.samples, reverse=True)[:SHOWN_BUCKETS]
    shown = set(largest)
    for bucket in (bucket for bucket in facts.buckets if bucket in shown):
        table.add_row(
            str(bucket.dataset), f"{bucket.size[0]}x{bucket.size[1]}", str(bucket.images), str(bucket.samples),
            str(bucket.batches), str(bucket.last_batch), _some(bucket.enlarged),
            f"{bucket.cropped:.0%}" if bucket.cropped >= 0.005 else "",
        )  # fmt: skip
    if others := [bucket for bucket in facts.buckets if bucket not in shown]:
        images, samples, batches = (
            sum(getattr(bucket, name) for bucket in others) for name in ("images", "samples", "batches")
        )
        table.add_row("", f"{len(others)} smaller", str(images), str(samples), str(batches), style="dim")
    return table


def _trained(facts: Forecast) -> Group:
    trained = facts.trained
    layers = ", ".join(f"{count} layers of {part}" for part, count in trained.modules)
    rows = [
        ("network", layers),
        (
            "parameters",
            f"{trained.parameters:,} trained, {trained.base_parameters:,} frozen in the transformer",
        ),
    ]
    groups = _table("group", "#parameters", "#learning rate")
    for group in trained.groups:
        groups.add_row(Text(group.name), f"{group.parameters:,}", f"{group.learning_rate:g}")
    return Group(_pairs(rows), Text(), groups)


def _files(facts: Forecast) -> Group:
    table = _table("file", "#size", "written after")
    shown: Sequence[FileFacts] = facts.files
    if len(shown) > SHOWN_FILES:
        shown = (*facts.files[: SHOWN_FILES - LAST_FILES], *facts.files[-LAST_FILES:])
    for number, file in enumerate(shown):
        if number == SHOWN_FILES - LAST_FILES and len(facts.files) > SHOWN_FILES:
            table.add_row(f"... {len(facts.files) - SHOWN_FILES} more", "", "", style="dim")
        name = file.path.name if file.kind != "samples" else f"{file.path.parent.name}/{file.path.name}"
        size = ("< " if file.kind in ("samples", "report") else "") + size_text(file.bytes)
        replaced = " (replaces one)" if file.exists else ""
        table.add_row(Text(name), size, moment_text(file) + replaced)
    folder = (
        str(facts.files[0].path.parent)
        if facts.files[0].kind != "samples"
        else str(facts.files[0].path.parents[1])
    )
    rows = [("folder", folder)]
    rows += [
        (
            "disk",
            f"{size_text(disk.needed)} needed at most on the disk of {disk.folder}, {size_text(disk.free)} free",
        )
        for disk in facts.disks
    ]
    return Group(_pairs(rows), Text(), table)


def _notices(notices: Iterable[str]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="yellow")
    table.add_column()
    listed = sorted(dict.fromkeys(notices), key=lambda notice: code_of(notice) is not None)
    for notice in listed:
        code = code_of(notice)
        table.add_row(code or "note", Text(re.sub(r"^\[[a-z0-9-]+\] ", "", notice)))
    if not listed:
        return Text("none", style="dim")
    return Group(
        table, Text("docs/advice.md explains the codes; --ignore_advice silences them.", style="dim")
    )


def _pairs(rows: Iterable[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim", min_width=20)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _table(*columns: str) -> Table:
    """A table without a frame; names that begin with # are of columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim", padding=(0, 1))
    for column in columns:
        table.add_column(column.removeprefix("#"), justify="right" if column.startswith("#") else "left")
    return table


def _some(number: int) -> str:
    return str(number) if number else ""
