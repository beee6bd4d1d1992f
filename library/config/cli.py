"""The command line: an argparse parser made of the table of options.

argparse splits words and shows --help; values are converted by the table, as those of a file are. Names may
be shortened as far as they are unambiguous among Kohya's, as Kohya's parser allows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn

from library.config.foreign import what_instead
from library.config.kinds import FALSE_WORDS, TRUE_WORDS
from library.config.names import suggestion
from library.config.notices import Notices
from library.config.options import COMMAND_LINE, SECRETS, Option
from library.config.train_config import OPTIONS, SECTIONS
from library.errors import ConfigError

CONTINUATIONS = ("", "\\", "^", "`")  # what ends a line in some shell, and is a word of its own in the others
KOHYAS = frozenset({"help", *(name for name, option in OPTIONS.items() if not option.row.ours)})
MARKS = {"used": "", "none": " [no effect]", "refused": " [refused]"}


@dataclass(frozen=True, slots=True)
class Given:
    """What was written for an option, not yet converted, and where."""

    raw: object
    place: str  # "command line" or "train.toml [section] line 7"


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError where argparse would print its usage and exit."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """What a shortened name may stand for: if it stands for one option in Kohya's trainer, for that one."""
        found: list[Any] = super()._get_option_tuples(option_string)
        kohyas = [one for one in found if one[0].dest in KOHYAS]
        return kohyas if len(kohyas) == 1 else found

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into one sentence."""
        raise ConfigError(
            f"{COMMAND_LINE}: {message.replace('ignored explicit argument', 'takes no value, not')}"
        )


@cache
def make_parser() -> argparse.ArgumentParser:
    """The parser of all options, made once. A given option is the list of its occurrences; others are absent."""
    parser = Parser(
        description="Train a LoRA or LyCORIS adapter for FLUX.1, with the options of Kohya's sd-scripts.",
        usage="%(prog)s [--config_file FILE.toml] [options]",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34),
    )
    for section, cls in SECTIONS.items():
        title = (cls.__doc__ or "").strip().rstrip(".")
        group = parser.add_argument_group(f"[{section}] {title}")
        for item in OPTIONS.values():
            if item.section == section:
                _add(group, item)
    return parser


def _add(group: argparse._ArgumentGroup, item: Option) -> None:
    text = help_text(item).replace("%", "%%")
    if item.type == "bool":
        group.add_argument(f"--{item.name}", action="append_const", const=True, dest=item.name, help=text)
        return
    group.add_argument(
        f"--{item.name}",
        action="append",
        nargs="*" if item.kind.many else None,
        metavar=item.kind.metavar,
        help=text,
    )


def help_text(item: Option) -> str:
    """One line: what it is, what it may be, its default, and whether it has an effect."""
    choices = ": " + ", ".join(str(choice) for choice in item.row.choices) if item.row.choices else ""
    default = item.row.default
    shown = "" if default is None or default is False or default == () else f" (default: {default!r})"
    ours = " [not in Kohya's]" if item.row.ours else ""
    return f"{item.row.help}{choices}{shown}{MARKS[item.row.effect.state]}{ours}"


def parse(argv: Sequence[str], notices: Notices) -> dict[str, Given]:
    """The options on the command line. The last of a repeated option counts.

    Raises ConfigError for unknown or incomplete options; exits after --help as argparse does.
    """
    namespace, rest = make_parser().parse_known_args(list(argv))
    if rest:
        raise ConfigError(_unknown(rest))
    given = {}
    for name, occurrences in vars(namespace).items():
        given[name] = Given(occurrences[-1], COMMAND_LINE)
        dropped = [value for value in occurrences[:-1] if value != occurrences[-1]]
        if dropped:
            words = ", ".join(" ".join(v) if isinstance(v, list) else str(v) for v in dropped)
            notices.remarks.append(
                f"{COMMAND_LINE}: --{name} is given several times; the last counts, "
                f"not {'***' if name in SECRETS else words}"
            )
    return given


def _unknown(rest: Sequence[str]) -> str:
    flags = [word.split("=")[0] for word in rest if word.startswith("--")]
    if rest[0].strip() in CONTINUATIONS:
        return (
            f"{COMMAND_LINE}: {rest[0]!r} stands alone; to go on in the next line, end the line with \\ in a Unix "
            "shell, ^ in a .bat file, ` in PowerShell, and nothing after it"
        )
    if not flags:
        flag = "; a flag stands alone, without a value" if rest[0].lower() in TRUE_WORDS | FALSE_WORDS else ""
        return f"{COMMAND_LINE}: {rest[0]!r} belongs to no option; names of options start with --{flag}"
    name = flags[0].removeprefix("--")
    hint = what_instead(name) or suggestion(name, OPTIONS)
    return f"{COMMAND_LINE}: unknown option '--{name}'{hint}"
