"""Size, orientation and transparency of a picture from its first bytes.

PNG, JPEG, WebP and BMP are read here, since a folder of a hundred thousand pictures should be looked at in seconds.
Whatever is unusual (other formats, damage, notes that lie further back) is left to Pillow, which these readers are
tested against.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from library.data import formats
from library.data.buckets import Size

READ_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
UPRIGHT = 1  # the EXIF orientation of a picture stored as it is seen
WITH_ALPHA = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})  # Pillow's modes
_HEAD = 1 << 16  # bytes read of a file
_MOST_PIXELS = 100_000_000  # above, Pillow says whether it opens the picture
_ORIENTATION = 0x0112
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_PROFILE = b"Raw profile type exif"  # how ImageMagick keeps EXIF in one of them
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class Header(NamedTuple):
    """What the first bytes of an image file tell."""

    size: Size  # after orientation
    orientation: int = UPRIGHT  # EXIF value, 1..8
    alpha: bool = False  # whether it has an alpha channel or a transparent colour


def read_header(path: Path | str) -> Header:
    """Header of a file, without decoding it. Raises one of READ_ERRORS."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(_HEAD)
        length = len(head) if len(head) < _HEAD else file.seek(0, 2)
    if not head:
        raise ValueError("the file is empty")
    for magic, parse in _PARSERS.items():
        if head.startswith(magic):
            try:
                found = parse(head, length)
            except (struct.error, IndexError):  # more than was read, or less than there should be
                break
            if found is not None and 0 < found.size[0] * found.size[1] < _MOST_PIXELS:
                return found
    return _ask_pillow(path)


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an open picture.

    A PNG is asked only for what stands before its pixels, else reading the header would decode it all. JPEG XL
    pictures are turned by their decoder and keep the note all the same; only a JPEG packed into one is not.
    """
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return UPRIGHT
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return UPRIGHT
    value = image.getexif().get(_ORIENTATION, UPRIGHT)
    return value if value in range(1, 9) else UPRIGHT


def _ask_pillow(path: Path | str) -> Header:
    formats.readable()
    with Image.open(path) as image:
        orientation = orientation_of(image)
        alpha = image.mode in WITH_ALPHA or "transparency" in image.info
        return _header(*image.size, orientation, alpha=alpha)


def _header(width: int, height: int, orientation: int, *, alpha: bool) -> Header:
    return Header((height, width) if orientation >= 5 else (width, height), orientation, alpha)


def _png(head: bytes, length: int) -> Header | None:
    width, height, _, colour = struct.unpack_from(">IIBB", head, 16)
    alpha = colour in (4, 6)
    at = 8
    while True:
        size, kind = struct.unpack_from(">I4s", head, at)
        if kind == b"IDAT":
            return Header((width, height), UPRIGHT, alpha)
        (checksum,) = struct.unpack_from(">I", head, at + 8 + size)
        if zlib.crc32(head[at + 4 : at + 8 + size]) != checksum or (at == 8) != (kind == b"IHDR"):
            return None
        if kind == b"eXIf" or (kind in _PNG_TEXTS and head.startswith(_PNG_PROFILE, at + 8)):
            return None
        alpha = alpha or kind == b"tRNS"
        at += 12 + size


def _jpeg(head: bytes, length: int) -> Header | None:
    size = None
    orientation = 0
    at = 2
    while True:
        mark, marker, segment = struct.unpack_from(">BBH", head, at)
        if mark != 0xFF or not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9:
            return None
        if marker == 0xDA:
            return _header(*size, orientation or UPRIGHT, alpha=False) if size else None
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", head, at + 5)
            size = (width, height)
        elif marker == 0xE1:
            noted = _app1(head[at + 4 : at + 2 + segment])
            if noted is None or (noted and orientation):
                return None
            orientation = noted or orientation
        at += 2 + segment


def _app1(data: bytes) -> int | None:
    """Orientation in a JPEG's note, 0 if it has none, None where Pillow has to look."""
    if data.startswith(b"Exif\0\0"):
        return _exif(data[6:])
    return None if b"tiff:Orientation" in data else 0


def _exif(data: bytes) -> int | None:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return None
    (at,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, at)
    for number in range(count):
        tag, kind, values, value = struct.unpack_from(order + "HHIH", data, at + 2 + 12 * number)
        if tag == _ORIENTATION:
            return value if kind == 3 and values == 1 and 1 <= value <= 8 else None
    return 0


def _webp(head: bytes, length: int) -> Header | None:
    (size,) = struct.unpack_from("<I", head, 4)
    if head[8:12] != b"WEBP" or size + 8 > length:
        return None
    kind = head[12:16]
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return Header((width & 0x3FFF, height & 0x3FFF))
    if kind == b"VP8L" and head[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", head, 21)
        return Header(((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1), UPRIGHT, bool(bits >> 28 & 1))
    if kind == b"VP8X" and not head[20] & 0x0C:  # neither EXIF nor XMP
        width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
        return Header((width, height), UPRIGHT, bool(head[20] & 0x10))
    return None


def _bmp(head: bytes, length: int) -> Header | None:
    size, width, height, planes, depth, packing = struct.unpack_from("<IiiHHI", head, 14)
    plain = size in (40, 108, 124) and planes == 1 and depth in (1, 4, 8, 24) and packing == 0
    return Header((width, abs(height))) if plain and width > 0 and length >= 14 + size else None


_PARSERS: dict[bytes, Callable[[bytes, int], Header | None]] = {
    b"\x89PNG\r\n\x1a\n": _png,
    b"\xff\xd8\xff": _jpeg,
    b"RIFF": _webp,
    b"BM": _bmp,
}
