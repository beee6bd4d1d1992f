"""Which files are pictures: by their endings, in any case, as far as Pillow and its plug-ins can read them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache

from PIL import Image

ALWAYS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# What they take where they cannot be read.
OPTIONAL = {
    ".avif": 'a Pillow that reads AVIF (pip install "pillow>=11.3")',
    ".jxl": "a plug-in for JPEG XL (pip install pillow-jxl-plugin)",
}
OTHER = frozenset({".gif", ".tif", ".tiff", ".heic", ".heif", ".jfif", ".jp2", ".psd", ".tga"})  # never read
_JXL_PLUGINS = ("pillow_jxl", "jxlpy.JXLImagePlugin")


@cache
def readable() -> frozenset[str]:
    """Endings of pictures that can be read here, in lower case. Loads Pillow's plug-ins, once a process."""
    Image.init()
    for plugin in _JXL_PLUGINS:
        if ".jxl" in Image.registered_extensions():
            break
        try:
            importlib.import_module(plugin)
        except ImportError:
            continue
    known = Image.registered_extensions()
    return frozenset([*ALWAYS, *(suffix for suffix in OPTIONAL if suffix in known)])


def suffix_of(name: str) -> str:
    """The ending of a file's name with its dot, as it is written; "" if there is none."""
    return name[name.rfind(".") :] if "." in name else ""


def stem_of(image: str) -> str:
    """The name of an image file without its ending."""
    return image[: image.rindex(".")]


def left_out(names: Iterable[str]) -> list[str]:
    """A sentence for each kind of picture among `names` that is not read here, and what to do about it."""
    found: dict[str, list[str]] = {}
    for name in names:
        suffix = suffix_of(name).lower()
        if suffix in OTHER or (suffix in OPTIONAL and suffix not in readable()):
            found.setdefault(suffix, []).append(name)
    said = []
    for suffix, of_kind in sorted(found.items()):
        what = f"{len(of_kind)} {suffix} files, such as {min(of_kind)}, are left out"
        if suffix in OPTIONAL:
            said.append(f"{what}, since they need {OPTIONAL[suffix]}")
        else:
            said.append(
                f"{what}, since only {', '.join(s[1:] for s in (*ALWAYS, *OPTIONAL))} are read; convert them"
            )
    return said
