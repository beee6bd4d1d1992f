"""The resolved options on a screen: one line each where there is room, two where there is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from library.config.loaded import LoadedConfig
from library.config.show import ResolvedOption, resolved_table

LEAST_EFFECT = 30  # columns that the effect needs beside the rest
_PLACE = re.compile(r"^(.*?)(?: \[.*\])? line (\d+)$")


def show_options(loaded: LoadedConfig, console: Console) -> None:
    """Options that were given or follow from one that was, by section; the rest is counted."""
    rows = resolved_table(loaded)
    given = [row for row in rows if row.source != "default"]
    needed = [max(cell_len(text) for text in column) for column in zip(*map(_cells, given), strict=True)]
    if sum(needed) + LEAST_EFFECT + 10 <= console.width:
        console.print(_one_line(given))
    else:
        for line in _two_lines(given):
            console.print(line, soft_wrap=True)
    rest = f"  {len(rows) - len(given)} more stay at their default (docs/options.md)"
    console.print(Text(rest, style="dim"), end="\n\n")


def place_text(source: str) -> str:
    """ "train.toml [model] line 7" as "train.toml:7"; other sources as they are."""
    return _PLACE.sub(r"\1:\2", source)


def _cells(row: ResolvedOption) -> tuple[str, str, str]:
    return row.name, _one_line_value(row), place_text(row.source)


def _one_line_value(row: ResolvedOption) -> str:
    return row.value.replace("\n", " | ")


def _one_line(rows: list[ResolvedOption]) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column()
    for section, options in groupby(rows, key=lambda row: row.section):
        table.add_row(Text(f"  {section}", style="bold"))
        for row in options:
            name, value, place = _cells(row)
            table.add_row(
                Text(f"    {name}"),
                Text(value, style=_colour(row)),
                Text(place, style="dim"),
                Text(row.effect),
            )
    return table


def _two_lines(rows: list[ResolvedOption]) -> Iterator[Text]:
    """Name and value on one line, into which no break is put however long it is; the rest below it."""
    for section, options in groupby(rows, key=lambda row: row.section):
        yield Text(f"  {section}", style="bold")
        for row in options:
            name, value, place = _cells(row)
            yield Text.assemble(f"    {name} = ", (value, _colour(row)))
            yield Text(f"        {place}: {row.effect}" if row.effect else f"        {place}", style="dim")


def _colour(row: ResolvedOption) -> str:
    return "green" if row.state == "used" else "strike"
