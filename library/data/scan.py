"""Looking into one folder: which files are images, how large they are, and what is wrong with them.

Only headers are read, in a thread pool. Problems are gathered, not raised, so that one message can list them
all.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from library.data.images import READ_ERRORS, Header, read_header
from library.errors import DatasetError
from library.files import atomic

_ALWAYS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_JXL_PLUGINS = ("pillow_jxl", "jxlpy.JXLImagePlugin")
SHOWN = 5  # problems spelled out in a message
INFO_FILE = "metadata_cache.json"


@dataclass(slots=True)
class Problems:
    """Everything found wrong so far, each as (path, what)."""

    items: list[tuple[Path, str]] = field(default_factory=list)

    def add(self, path: Path, what: str) -> None:
        """Note one problem."""
        self.items.append((path, what))

    def check(self) -> None:
        """Raise DatasetError with the first few problems if there is any."""
        if not self.items:
            return
        listed = ", ".join(f"{path} {what}" for path, what in self.items[:SHOWN])
        rest = len(self.items) - SHOWN
        more = f", and {rest} more" if rest > 0 else ""
        number = "one problem" if len(self.items) == 1 else f"{len(self.items)} problems"
        raise DatasetError(f"the training data has {number}: {listed}{more}; correct or remove them")


@dataclass(frozen=True, slots=True)
class Listing:
    """One folder, read once."""

    folder: Path
    names: frozenset[str]  # of all plain files
    images: tuple[Path, ...]  # sorted by path
    overlooked: tuple[str, ...]  # names such as a.Jpg, which Kohya does not take for images


def image_extensions() -> frozenset[str]:
    """What counts as an image here, each in lower and in upper case; AVIF and JPEG XL if Pillow can read
    them.
    """
    Image.init()
    known = Image.registered_extensions()
    for plugin in _JXL_PLUGINS:
        if ".jxl" in known:
            break
        try:
            importlib.import_module(plugin)
        except ImportError:
            continue
    chosen = [*_ALWAYS, *(suffix for suffix in (".avif", ".jxl") if suffix in Image.registered_extensions())]
    return frozenset(chosen) | {suffix.upper() for suffix in chosen}


def list_folder(folder: Path) -> Listing:
    """Images directly inside `folder`. Raises DatasetError if it cannot be listed."""
    extensions = image_extensions()
    try:
        with os.scandir(folder) as entries:
            names = frozenset(entry.name for entry in entries if entry.is_file())
    except OSError as error:
        raise DatasetError(
            f"the image folder {folder} cannot be read ({error.strerror}); correct it"
        ) from error
    visible = [name for name in names if not name.startswith(".")]
    images = [folder / name for name in visible if os.path.splitext(name)[1] in extensions]
    overlooked = [
        name
        for name in visible
        if (suffix := os.path.splitext(name)[1]) not in extensions and suffix.lower() in extensions
    ]
    return Listing(folder, names, tuple(sorted(images, key=str)), tuple(sorted(overlooked)))


def read_headers(
    paths: Sequence[Path], problems: Problems, *, known: Mapping[Path, Header] | None = None
) -> dict[Path, Header]:
    """Headers of all readable paths; `known` ones are not opened again."""
    found = dict(known or {})
    unread = [path for path in paths if path not in found]

    def read(path: Path) -> Header | str:
        try:
            return read_header(path)
        except READ_ERRORS as error:
            return f"cannot be read as an image ({type(error).__name__})"

    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        for path, result in zip(unread, pool.map(read, unread), strict=True):
            if isinstance(result, str):
                problems.add(path, result)
            elif min(result.size) < 1:
                problems.add(path, "has no pixels")
            else:
                found[path] = result
    return {path: found[path] for path in paths if path in found}


def read_info(folder: Path) -> dict[Path, Header]:
    """Headers noted by `cache_info`, where the file still has the size and time it had then.

    Kohya's own entries lack both and know no orientation, so they are read anew; captions always are.
    """
    try:
        entries = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = {}
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        path = Path(name)
        stamp = _stamp(path)
        if stamp is not None and isinstance(entry, dict) and entry.get("stamp") == stamp:
            width, height = entry["resolution"]
            found[path] = Header((width, height), entry["orientation"])
    return found


def write_info(folder: Path, entries: Iterable[tuple[Path, Header, str]]) -> str | None:
    """Write Kohya's metadata_cache.json with a stamp and the orientation added; a notice if it cannot be
    written.
    """
    content = {
        str(path): {
            "caption": caption,
            "resolution": list(header.size),
            "orientation": header.orientation,
            "stamp": _stamp(path),
        }
        for path, header, caption in entries
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    target = folder / INFO_FILE
    try:
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            atomic.write_text(target, text)
    except OSError as error:
        return f"cache_info could not write {target} ({error.strerror}); image sizes are read anew next time"
    return None


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
