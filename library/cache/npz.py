"""npz files as caches need them: look at names and shapes without reading arrays, read some, replace the
whole file.

Uncompressed, as `np.savez` writes them and Kohya reads them. What cannot be read at all counts as absent for
the caller, who builds it anew.
"""

from __future__ import annotations

import json
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from library.files import atomic

Array = NDArray[Any]
UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
# numpy reads headers with ast.literal_eval, which fails now and then in threads that do so at once (Python 3.11:
# "AST constructor recursion depth mismatch").
_PARSING = threading.Lock()
_READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every array by name; only headers are read. Raises one of UNREADABLE."""
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                with _PARSING:
                    header = _READ_HEADER[version](member)
                shapes[name.removesuffix(".npy")] = header[0]
    return shapes


@contextmanager
def opened(path: Path) -> Iterator[NpzFile]:
    """The file by array name, each array read when it is asked for. Raises one of UNREADABLE, inside too."""
    with np.load(path, allow_pickle=False) as archive:
        yield archive


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, Array]:
    """The named arrays, small ones. Raises one of UNREADABLE, also for a damaged array."""
    with np.load(path, allow_pickle=False) as archive, _PARSING:
        return {name: archive[name] for name in names}


def read_all(path: Path) -> dict[str, Array]:
    """All arrays of a file."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Replace the file as a whole."""
    with atomic.replacing(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]  # the stub takes array names for its own options


def pack_note(note: Mapping[str, object]) -> Array:
    """A JSON note as an array of one text, which other readers of the file leave alone."""
    return np.array(json.dumps(note, sort_keys=True))


def unpack_note(array: Array) -> dict[str, Any]:
    """The note of `pack_note`; empty if it is not one."""
    try:
        note = json.loads(str(array))
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}
