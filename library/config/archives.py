"""Folders of pictures that come as a zip file: unpacked once, into a folder named by what is in it.

Every rank may do it at the same time: each unpacks into a folder of its own, and the first to rename it wins.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from library.errors import ConfigError


def is_archive(path: Path) -> bool:
    """Whether a name stands for a zip file that is there."""
    return path.suffix.lower() == ".zip" and path.is_file()


def unpacked(archive: Path, parent: Path) -> Path:
    """The folder in `parent` with the files of `archive`, made if it is not there.

    Sub-folders in the archive are dissolved, hidden files left out. The folder's name follows from names, sizes
    and checksums inside, so a changed archive gets a new one. Raises ConfigError for a broken archive, and for
    two files of one name.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _members(opened, archive)
            content = [(name, info.CRC, info.file_size) for name, info in sorted(members.items())]
            folder = parent / f"{archive.stem}-{hashlib.sha256(repr(content).encode()).hexdigest()[:12]}"
            if not folder.is_dir():
                _unpack(opened, members, folder)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ConfigError(f"{archive}: this zip file cannot be unpacked ({error})") from None
    except OSError as error:
        raise ConfigError(f"{archive}: cannot be unpacked into {parent} ({error.strerror})") from None
    return folder


def _members(opened: zipfile.ZipFile, archive: Path) -> dict[str, zipfile.ZipInfo]:
    """The files by their names without folders."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in opened.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if info.is_dir() or any(part.startswith((".", "__MACOSX")) for part in path.parts):
            continue
        if path.name in found:
            raise ConfigError(f"{archive} has two files named {path.name}: rename one of them")
        found[path.name] = info
    return found


def _unpack(opened: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        for name, info in members.items():
            with opened.open(info) as source, (own / name).open("wb") as target:
                shutil.copyfileobj(source, target)
        own.chmod(0o755)
        try:
            os.rename(own, folder)
        except OSError:
            if not folder.is_dir():  # else another rank was faster
                raise
    finally:
        shutil.rmtree(own, ignore_errors=True)
