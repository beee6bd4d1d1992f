"""Kohya's `cache_info`: sizes and captions in metadata_cache.json, in the image folder.

A stamp, the orientation and whether there is transparency are added. Kohya's own entries lack them, so those
images are read anew; captions always are, since an edited caption must count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from library.data.headers import Header
from library.data.size_cache import Noted
from library.files import atomic

NAME = "metadata_cache.json"


def read_info(folder: Path) -> dict[str, Noted]:
    """What the file says, by image name; nothing if it cannot be read."""
    try:
        entries = json.loads((folder / NAME).read_bytes())
        found = {}
        for path, entry in entries.items():
            if "stamp" in entry and "alpha" in entry:
                size, time = entry["stamp"]
                width, height = entry["resolution"]
                header = Header((width, height), entry["orientation"], entry["alpha"])
                found[os.path.basename(path)] = Noted((size, time), header)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return found


def write_info(folder: Path, entries: Iterable[tuple[str, Noted, str]]) -> str | None:
    """Write the file from (name, what was noted, caption); returns a notice if it cannot be written."""
    content = {
        str(folder / name): {
            "caption": caption,
            "resolution": list(noted.header.size),
            "orientation": noted.header.orientation,
            "alpha": noted.header.alpha,
            "stamp": list(noted.stamp),
        }
        for name, noted, caption in entries
    }
    text = json.dumps(content, indent=2, ensure_ascii=False)
    target = folder / NAME
    try:
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            atomic.write_text(target, text)
    except (OSError, ValueError) as error:
        return f"cache_info could not write {target} ({error}); image sizes are read anew next time"
    return None
