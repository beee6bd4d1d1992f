"""The reference page of all options, as Markdown made of the table."""

from __future__ import annotations

from library.config.options import Option
from library.config.train_config import OPTIONS, SECTIONS

INTRODUCTION = """\
# Options

Made by `python -m tools.write_options` from `library/config/sections/`. Every option is a flag
(`--name value`) and a key of the file that `--config_file` names; names of TOML tables in that file are free.
Names, types and defaults are those of Kohya's `flux_train_network.py`; options marked *ours* are not in it.
"Effect" says what this version does with an option that is given: used, accepted with no effect, or refused.
"""

TYPE_WORDS = {
    "bool": "flag",
    "int": "whole number",
    "GpuCount": "number, or all",
    "BlockCount": "number, auto or all",
    "float": "number",
    "int | float": "steps, share below 1, or %",
    "str": "text",
    "PromptText": "file or text",
    "ModelName": "path or name",
    "Path": "path",
    "tuple[int, int]": "W,H or one number",
    "tuple[float, float]": "low,high",
    "tuple[str, ...]": "list of texts",
    "tuple[Path, ...]": "list of paths",
    "tuple[float, ...]": "list of numbers",
}


def options_markdown() -> str:
    """The whole page, one table a section."""
    parts = [INTRODUCTION]
    for section, cls in SECTIONS.items():
        rows = [_row(item) for item in OPTIONS.values() if item.section == section]
        head = [
            f"## {section}",
            "",
            (cls.__doc__ or "").strip(),
            "",
            "| option | type | default | effect | meaning |",
            "|---|---|---|---|---|",
        ]
        parts.append("\n".join([*head, *rows]) + "\n")
    return "\n".join(parts)


def _row(item: Option) -> str:
    kind = TYPE_WORDS[item.type]
    if item.row.choices:
        kind = ", ".join(f"`{choice}`" for choice in item.row.choices)
    limits = " ".join(part for part in (str(item.row.limit), item.row.limit.unit) if part)
    name = f"`{item.name}`" + (" *ours*" if item.row.ours else "")
    cells = (name, f"{kind} {limits}".strip(), _default(item.row.default), _effect(item), item.row.help)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(value: object) -> str:
    if value is None or value in ("", ()):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _effect(item: Option) -> str:
    effect = item.row.effect
    if effect.state == "used":
        except_for = "; ".join(
            f"`{value}` refused: {reason}" for value, reason in effect.refused_values.items()
        )
        return f"used; {except_for}" if except_for else "used"
    return ("no effect: " if effect.state == "none" else "refused: ") + effect.reason
