"""An imported config as text: TOML with the key of each option beside it, and the list of what became of each key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from library.config.dataset_file import read_dataset_tables
from library.config.importers.rules import ASSUMED, DATASET, READ, Imported, Note, shown
from library.config.options import SECRETS, UNSET
from library.config.toml_file import toml_value
from library.config.train_config import OPTIONS
from library.errors import ConfigError


def options_toml(imported: Imported, name: str, *, dataset: str | None = None) -> str:
    """The options as a flat TOML file, each with the key of `name` it comes from. Secrets are left out.

    `dataset` is the file of the dataset tables, named as dataset_config. Raises ConfigError for a value that cannot
    be read.
    """
    lines = [f"# {name}, a config of {imported.kind}, as options of this trainer", ""]
    for option, raw in imported.options.items():
        key = imported.origins[option]
        origin = "" if key == option else f"  # {key}"
        try:
            value = OPTIONS[option].read(raw, f"{name} {key}")
        except ConfigError:
            if OPTIONS[option].row.effect.state == "none":
                continue  # as at loading
            raise
        if option in SECRETS:
            lines.append(f"# {option} is not written; give it on the command line{origin}")
        elif value is not UNSET:
            lines.append(f"{option} = {toml_value(value)}{origin}")
    if dataset is not None:
        lines.append(f"dataset_config = {toml_value(dataset)}  # the datasets")
    return "\n".join(lines) + "\n"


def dataset_toml(imported: Imported, name: str) -> str:
    """The dataset tables as a dataset_config file. Raises ConfigError for a value that cannot be read."""
    content: dict[str, Any] = dict(imported.dataset or {"datasets": []})
    read_dataset_tables(content, name, masked_loss=True)
    lines = [f"# The datasets of {name}, a config of {imported.kind}"]
    for table in content["datasets"]:
        lines += [
            "",
            "[[datasets]]",
            *(f"{key} = {toml_value(table[key])}" for key in table if key != "subsets"),
        ]
        for subset in table["subsets"]:
            lines += [
                "",
                "  [[datasets.subsets]]",
                *(f"  {key} = {toml_value(value)}" for key, value in subset.items()),
            ]
    return "\n".join(lines) + "\n"


def account(imported: Imported) -> str:
    """The whole list: mapped, assumed, dropped with reasons, and keys that asked for nothing."""
    groups: tuple[tuple[str, Iterator[str]], ...] = (
        (
            "mapped",
            (_mapped(note) for note in imported.notes if note.to and (_differs(note) or not _same(note))),
        ),
        (
            "assumed, as the other program has it so",
            (_assumed(note) for note in imported.notes if _is_assumed(note)),
        ),
        ("dropped", (_dropped(note) for note in imported.notes if not note.to and not note.is_off)),
    )
    alike = [note.key for note in imported.notes if note.to and _same(note) and not _is_assumed(note)]
    parts = ["taken as they are:\n  " + ", ".join(dict.fromkeys(alike))] if alike else []
    for title, lines in groups:
        found = list(dict.fromkeys(lines))
        if found:
            parts.append("\n".join([f"{title}:", *(f"  {line}" for line in found)]))
    off = [note.key for note in imported.notes if not note.to and note.is_off]
    if off:
        parts.append("not set, or switched off:\n  " + ", ".join(dict.fromkeys(off)))
    return "\n".join(parts) + "\n"


def remarks(imported: Imported, name: str) -> list[str]:
    """What a run says of an imported config: what was renamed, and what was dropped, by reason.

    Values are left out: they may be secrets, and the dry run lists them beside their keys.
    """
    targets: dict[str, list[str]] = {}
    for note in imported.notes:
        if _is_renamed(note):
            targets.setdefault(note.to.partition(" = ")[0], []).append(note.key)
    renamed = [f"{', '.join(dict.fromkeys(keys))} -> {target}" for target, keys in targets.items()]
    reasons: dict[str, list[str]] = {}
    for note in imported.notes:
        if not note.to and not note.is_off:
            reasons.setdefault(note.text, []).append(note.key)
    list_of_keys = ": " + "; ".join(renamed) if renamed else ""
    said = [f"{name} is read as a config of {imported.kind}{list_of_keys}"]
    said += [f"{name}: {note.key}: {note.text}" for note in imported.notes if note.to and _differs(note)]
    return said + [f"{name}: dropped {', '.join(keys)} ({reason})" for reason, keys in reasons.items()]


def _differs(note: Note) -> bool:
    return bool(note.text) and not _is_assumed(note)


def _is_renamed(note: Note) -> bool:
    """Whether a run says so: datasets are shown with the plan, and what only told the kind is no news."""
    return bool(note.to) and not _same(note) and note.to != READ and not note.to.startswith(DATASET)


def _same(note: Note) -> bool:
    return note.to.startswith(f"{note.key} = ") or _is_assumed(note)


def _is_assumed(note: Note) -> bool:
    return note.key == ASSUMED


def _mapped(note: Note) -> str:
    return f"{note.key} = {shown(_masked(note))} -> {_hidden(note)}" + (
        f" ({note.text})" if note.text else ""
    )


def _assumed(note: Note) -> str:
    return f"{note.to} ({note.text})"


def _dropped(note: Note) -> str:
    return f"{note.key} = {shown(_masked(note))}: {note.text}"


def _masked(note: Note) -> object:
    is_secret = note.key.endswith(("_token", "api_key"))
    return "***" if is_secret and note.value else note.value


def _hidden(note: Note) -> str:
    name = note.to.partition(" = ")[0]
    return f"{name} = ***" if name in SECRETS else note.to
