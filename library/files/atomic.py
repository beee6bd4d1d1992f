"""Writing files whole: a reader, a crash or a full disk never meets half a file."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BYTES = 120  # of a name, in that of its temporary folder: file systems allow 255, some 143
ABANDONED_SECONDS = 3600.0  # a file is written in seconds
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.tmp")


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
    """Give a path of the same name in a temporary folder beside `path`; what is written there is synced and renamed.

    On an error `path` is as it was, and the folder goes, with what other libraries put into it meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_folder(path)
    temporary = folder / path.name
    try:
        yield temporary
        fsync(temporary)
        temporary.chmod(0o666 & ~current_umask())
        temporary.replace(path)
        fsync(path.parent)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk names no file, others the temporary one
            error.filename = str(path)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def temporary_folder(path: Path) -> Path:
    """A new folder beside `path`, by whose name `stands_for` knows it again."""
    name = os.fsencode(path.name)[:_BYTES].decode("utf-8", "ignore")
    return Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=path.parent))


def stands_for(folder: Path) -> str | None:
    """The name for which a temporary folder was made, cut off if it is very long; None for any other folder."""
    found = _TEMPORARY.fullmatch(folder.name)
    return None if found is None else found["name"]


def clear_abandoned(parent: Path, suffix: str) -> None:
    """Remove temporary folders of names with `suffix` that nobody has written to for an hour, in a folder that others
    may be writing to at this moment.
    """
    for folder in parent.glob(f".*{suffix}.*.tmp"):
        with suppress(OSError):  # gone meanwhile
            if stands_for(folder) is not None and time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


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
