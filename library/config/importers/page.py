"""The tables of docs/migrating.md, made of the rules of each source."""

from __future__ import annotations

from library.config.importers import (
    ai_toolkit_keys,
    ai_toolkit_server,
    kohya_gui,
    replicate,
    simpletuner_keys,
)
from library.config.importers.rules import Rule, Table

# Heading -> tables, each with a sentence above it.
PAGES: dict[str, tuple[tuple[str, Table], ...]] = {
    "kohya_ss": (
        (
            "Every field that has the name of [an option](options.md) is that option; these differ:",
            kohya_gui.SPECIAL,
        ),
    ),
    "ai-toolkit": (
        ("The job:", ai_toolkit_keys.JOB),
        ("Its process, keys with dots for nesting:", ai_toolkit_keys.PROCESS),
        ("Each of its `datasets`:", ai_toolkit_keys.SETS),
        (f"Arguments of a server's `{ai_toolkit_server.TOOL}`:", ai_toolkit_server.KEYS),
    ),
    "SimpleTuner": (
        ("config.json, with or without leading dashes:", simpletuner_keys.KEYS),
        ("Each dataset of the file that `data_backend_config` names:", simpletuner_keys.BACKEND),
    ),
    "Replicate": (("The trainer's inputs:", replicate.KEYS),),
}
START, END = "<!-- table: {} -->", "<!-- end of table -->"


def with_tables(page: str) -> str:
    """The page with what stands between its marks made anew."""
    for name, tables in PAGES.items():
        start = START.format(name)
        before, found, after = page.partition(start)
        assert found, f"the page has no {start}"
        _, end, rest = after.partition(END)
        assert end, f"the page has no {END} after {start}"
        page = f"{before}{start}\n\n{_markdown(tables)}\n{END}{rest}"
    return page


def _markdown(tables: tuple[tuple[str, Table], ...]) -> str:
    return "\n".join(f"{sentence}\n\n{_rows(table)}" for sentence, table in tables)


def _rows(table: Table) -> str:
    """One row for each outcome; keys that share it stand together."""
    outcomes: dict[tuple[str, str], list[str]] = {}
    for key, rule in table.items():
        outcomes.setdefault((_target(rule), rule.note), []).append(f"`{key}`")
    rows = ["| key | here | |", "|---|---|---|"]
    for (target, note), keys in outcomes.items():
        cells = (", ".join(keys), target, note)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _target(rule: Rule) -> str:
    if rule.is_dropped:
        return "*dropped*"
    return ", ".join(f"`{name}`" for name in rule.to) or "*read*"
