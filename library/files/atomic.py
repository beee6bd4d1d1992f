"""Writing files whole: a reader, a crash or a full disk never meets half a file."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_BYTES = 120  # of a name, in that of its temporary file: file systems allow 255, some 143
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.tmp(\.[^.]+)?")


def fsync(path: Path) -> None:
    """Make what was written to a file, or the renames inside a folder, durable."""
    if os.name == "nt":  # syncs only what is open for writing, and no folders
        if path.is_dir():
            return
        descriptor = os.open(path, os.O_RDWR)
    else:
        descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` (same suffix); on success it is synced and renamed onto `path`.

    On an error the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        prefix=_prefix(path.stem), suffix=f".tmp{path.suffix}", dir=path.parent
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        fsync(temporary)
        temporary.chmod(0o666 & ~current_umask())
        temporary.replace(path)
        fsync(path.parent)
    except OSError as error:
        if error.filename in (None, name):  # a full disk names no file, others the temporary one
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporary_folder(path: Path) -> Path:
    """A new folder beside `path`: to be filled and renamed onto it, or to take it in before it is removed."""
    return Path(tempfile.mkdtemp(prefix=_prefix(path.name), suffix=".tmp", dir=path.parent))


def stands_for(temporary: Path) -> str | None:
    """Name, without suffix, of the file or folder that a temporary one was to become, shortened if it is very long.

    None for what no function here has named: such names begin with a dot, and are left only where a process was killed.
    """
    found = _TEMPORARY.fullmatch(temporary.name)
    return None if found is None else found["name"]


def _prefix(name: str) -> str:
    return f".{os.fsencode(name)[:_BYTES].decode('utf-8', 'ignore')}."


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def current_umask() -> int:
    """The process's umask; it can only be read by setting it."""
    value = os.umask(0)
    os.umask(value)
    return value
