"""Reading TOML as users write it: with a byte order mark, Windows line ends, and mistakes to be named.

Values come from Python's TOML 1.0 parser, which reads more than the `toml` package that Kohya uses (lists of
mixed types) except for blanks of other scripts around values: these are made plain first. It keeps no
positions; the lines of the keys are found by a scan of their own.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from library.config.names import files_near
from library.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyPath = tuple[str | int, ...]  # ("datasets", 0, "resolution"): keys, and places in arrays of tables

STRING_OR_COMMENT = (
    r'"""(?:\\.|[^\\])*?"""'  # strings of several lines
    r"|'''.*?'''"
    r'|"(?:\\.|[^"\\\n])*"'  # strings of one line
    r"|'[^'\n]*'"
    r"|\#[^\n]*"
)
TOKEN = re.compile(
    STRING_OR_COMMENT + r"|[\n\[\]{}=]"
    r"|[^\s\[\]{}=\#\"']+"  # bare keys, numbers, commas
    r"|[\"']",  # a quote that is never closed
    re.DOTALL,
)
# A blank that is not TOML's: of CJK input, or copied from a web page.
FOREIGN_BLANK = re.compile(STRING_OR_COMMENT + r"|(?P<blank>[^\S\n\t ])", re.DOTALL)
HEADER = "["  # opens the name of a table at the start of a line
POSITION = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without byte order mark and with plain line ends. Raises ConfigError.

    UTF-16 is read too, as PowerShell writes it: it begins with a mark that no UTF-8 has.
    """
    try:
        with path.open("rb") as file:
            wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
        return path.read_text(encoding="utf-16" if wide else "utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file{files_near(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not {error.encoding.upper()}; save the file as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """The tables of a TOML text; `path` is for the message. Raises ConfigError with line and column."""
    try:
        return tomllib.loads(FOREIGN_BLANK.sub(lambda match: " " if match["blank"] else match[0], text))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_not_toml(text, path, str(error))) from None


def _not_toml(text: str, path: Path, reason: str) -> str:
    """The sentence for a text that the parser refuses with `reason`, which ends with the position."""
    lines = text.split("\n")
    found = POSITION.search(reason)
    at_end = found is None or found[1] is None
    line = len(text.rstrip().split("\n")) if found is None or at_end else int(found[1])
    column = len(lines[line - 1]) + 1 if found is None or at_end else int(found[2])
    where = f"{path} line {line}, column {column}"
    if reason.startswith("Cannot overwrite"):
        for key, numbers in key_lines(text).items():
            if line in numbers[1:]:
                return f"{where}: {key[-1]} is given twice, first on line {numbers[0]}; remove one of them"
    hint = ""
    if at_end:
        hint = "; something is missing at the end, such as a closing bracket"
    elif "\\" in lines[line - 1]:
        hint = (
            "; a backslash in double quotes is an escape, so write a Windows path with / "
            "or in single quotes, 'C:\\folder\\file'"
        )
    elif re.match(r"\s*[\w-]+\s*:", lines[line - 1]):
        hint = "; write key = value, the colon is YAML's or JSON's"
    elif re.search(r"=\s*(True|False|None)\b", lines[line - 1]):
        hint = "; write true or false in small letters, and leave out what is None"
    return f"{where}: this is not TOML ({POSITION.sub('', reason)}){hint}"


def toml_value(value: object) -> str:
    """A flag, number, text, path or list in TOML; JSON writes all of them so, but for one character."""
    return json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")


def key_lines(text: str) -> dict[KeyPath, list[int]]:
    """The lines, from 1, where each key or table header is written, by its path from the top.

    Text that is not TOML gives some lines or none, no error.
    """
    lines: dict[KeyPath, list[int]] = {}
    arrays: dict[KeyPath, int] = {}  # arrays of tables -> their last index
    table: KeyPath = ()
    for number, tokens in _statements(text):
        if tokens[0] == HEADER:
            names = _dotted("".join(tokens).strip("[]"))
            table = ()
            for name in names[:-1]:
                table = _inside((*table, name), arrays)
            table = (*table, names[-1])
            if tokens[:2] == [HEADER, HEADER]:
                lines.setdefault(table, []).append(number)
                arrays[table] = arrays.get(table, -1) + 1
            table = _inside(table, arrays)
            lines.setdefault(table, []).append(number)
        elif "=" in tokens:
            key = _dotted("".join(tokens[: tokens.index("=")]))[0]
            lines.setdefault((*table, key), []).append(number)
    return lines


def line_of(lines: Mapping[KeyPath, list[int]], path: KeyPath) -> str:
    """ " line 7" of the key or of the nearest table around it that has one, or "" if none has."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return f" line {lines[path[:length]][0]}"
    return ""


def _inside(table: KeyPath, arrays: Mapping[KeyPath, int]) -> KeyPath:
    """The last element of an array of tables; another table as it is."""
    return (*table, arrays[table]) if table in arrays else table


def _statements(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and tokens of each header and each `key = value`, over all lines of its brackets."""
    number, start, depth = 1, 1, 0
    tokens: list[str] = []
    for match in TOKEN.finditer(text):
        token = match.group()
        if token == "\n" and depth <= 0 and tokens:
            yield start, tokens
            tokens, depth = [], 0
        elif token != "\n" and not token.startswith("#"):
            start = number if not tokens else start
            tokens.append(token)
            depth += (token in "[{") - (token in "]}")
        number += token.count("\n")
    if tokens:
        yield start, tokens


def _dotted(name: str) -> list[str]:
    return [part.strip().strip("\"'") for part in name.split(".")]
