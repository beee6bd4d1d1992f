"""Reading TOML as users write it: with a byte order mark, Windows line ends, and mistakes to be named.

The values come from the `toml` package, which Kohya uses too; since it keeps no positions, the lines of the
keys are found by a scan of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import toml

from library.errors import ConfigError

TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"""'  # strings of several lines
    r"|'''.*?'''"
    r'|"(?:\\.|[^"\\\n])*"'  # strings of one line
    r"|'[^'\n]*'"
    r"|\#[^\n]*"  # comments
    r"|[\n\[\]{}=]"
    r"|[^\s\[\]{}=\#\"']+"  # bare keys, numbers, commas
    r"|[\"']",  # a quote that is never closed
    re.DOTALL,
)
HEADER = "["  # opens the name of a table at the start of a line


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without byte order mark and with plain line ends. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def parse_toml(text: str, path: Path) -> dict[str, Any]:
    """The tables of a TOML text; `path` is for the message. Raises ConfigError with line and column."""
    try:
        return toml.loads(text)
    except toml.TomlDecodeError as error:
        lines = text.splitlines() or [""]
        written = lines[min(error.lineno, len(lines)) - 1]
        hint = "; put a Windows path in single quotes" if "\\" in written else ""
        where = f"{path} line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{where}: this is not TOML ({error.msg.rstrip('.')}){hint}") from None
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        # What the toml package lets through for some broken texts, without a position.
        raise ConfigError(f"{path}: this is not TOML ({error})") from None


def key_lines(text: str) -> dict[tuple[str, str], list[int]]:
    """(table, key) -> the lines, from 1, where the key is written. The table is "" above the first header.

    A header [a.b] counts as the key b of a. Text that is not TOML gives some lines or none, no error.
    """
    lines: dict[tuple[str, str], list[int]] = {}
    table = ""
    for number, tokens in _statements(text):
        if tokens[0] == HEADER:
            names = _dotted("".join(tokens).strip("[]"))
            table, key = (names[0], names[1]) if len(names) > 1 else ("", names[0])
            lines.setdefault((table, key), []).append(number)
            table = names[0]
        elif "=" in tokens:
            key = _dotted("".join(tokens[: tokens.index("=")]))[0]
            lines.setdefault((table, key), []).append(number)
    return lines


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
