"""Looking into one folder: which files are images, how large they are, and what is wrong with them.

Only headers are read, in threads, and what was read before is remembered: see `size_cache`. Problems are
gathered, not raised, so that one message can list them all.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError

from library.data import formats, size_cache
from library.data.headers import READ_ERRORS, Header, read_header
from library.data.problems import Problems, shown
from library.data.size_cache import Noted
from library.errors import DatasetError

logger = logging.getLogger(__name__)

_CHUNK = 256  # files handed to a thread at once
_SLOW = 5e-5  # seconds an item: more than a file takes that the system holds in memory
_MANY = 20_000  # files whose reading is announced

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Listing:
    """One folder, read once."""

    folder: Path
    names: frozenset[str]  # of all plain files
    images: tuple[str, ...]  # names of the images, sorted
    notices: tuple[str, ...]  # what Kohya does not take, and what is not taken here


def list_folder(folder: Path) -> Listing:
    """Images directly inside `folder`, whatever the case of their endings. Raises DatasetError if it cannot be
    listed.
    """
    try:
        with os.scandir(folder) as entries:
            names = frozenset(entry.name for entry in entries if entry.is_file())
    except OSError as error:
        raise DatasetError(
            f"the image folder {folder} cannot be read ({error.strerror}); correct it"
        ) from error
    known = formats.readable()
    taken = {ending for suffix in known for ending in (suffix, suffix.upper())}
    images, mixed, others = [], [], []
    for name in names:
        suffix = formats.suffix_of(name)
        if name.startswith("."):
            continue
        if suffix in taken:
            images.append(name)
        elif suffix.lower() in known:
            mixed.append(name)
        else:
            others.append(name)
    notices = [f"{folder}: {said}" for said in formats.left_out(others)]
    if mixed:
        notices.append(f"{folder}: {shown(sorted(mixed))} are used too, which Kohya's trainer leaves out")
    return Listing(folder, names, tuple(sorted(images + mixed)), tuple(notices))


def read_headers(folder: Path, names: Sequence[str], problems: Problems) -> dict[str, Header]:
    """Headers of all readable images of a folder, by name; remembered ones are not opened again."""
    known = size_cache.read(folder, len(names))
    found = scan(folder, names, known, problems)
    if any(known.get(name) is not noted for name, noted in found.items()):
        # Another metadata file may name other images of this folder.
        others = {
            name: noted for name, noted in known.items() if name not in found and (folder / name).exists()
        }
        size_cache.write(folder, others | found)
    return {name: noted.header for name, noted in found.items()}


def scan(
    folder: Path, names: Sequence[str], known: Mapping[str, Noted], problems: Problems
) -> dict[str, Noted]:
    """Look at each image; `known` ones whose stamp is still right are not opened. Unreadable ones are absent."""
    place = os.path.join(folder, "")  # joined once: a hundred thousand joins take a quarter of a second

    def look(name: str) -> Noted | str:
        path = place + name
        try:
            status = os.stat(path)
            stamp = (status.st_size, status.st_mtime_ns)
            remembered = known.get(name)
            if remembered is not None and remembered.stamp == stamp:
                return remembered
            header = read_header(path)
        except READ_ERRORS as error:
            return _problem(error)
        return Noted(stamp, header) if min(header.size) > 0 else "has no pixels"

    if len(names) - len(known) >= _MANY:
        logger.info("reading the sizes of %d images in %s", len(names), folder)
    found = {}
    for name, one in zip(names, in_threads(look, names), strict=True):
        if isinstance(one, str):
            problems.add(folder / name, one)
        else:
            found[name] = one
    return found


def in_threads(read: Callable[[str], T], items: Sequence[str]) -> list[T]:
    """`read` of every item in order, many at a time, since a disk or a network answers them together.

    What the system holds in memory is read one by one, as long as that goes fast: threads would only wait for each
    other's turn at the interpreter.
    """

    def read_chunk(start: int) -> list[T]:
        return [read(item) for item in items[start : start + _CHUNK]]

    done: list[T] = []
    while len(done) < len(items):
        began = time.perf_counter()
        done += read_chunk(len(done))
        if time.perf_counter() - began > _CHUNK * _SLOW:
            break
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        rest = pool.map(read_chunk, range(len(done), len(items), _CHUNK))
        return done + [one for chunk in rest for one in chunk]


def _problem(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is damaged or not an image that can be read"
    if isinstance(error, Image.DecompressionBombError):
        return "has more pixels than can be read safely"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    return f"cannot be read as an image ({error})"
