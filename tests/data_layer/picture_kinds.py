"""Small pictures of every kind that a data set may hold, with what they look like to a viewer."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

SIZE = (24, 16)  # width, height as it is seen
RED, BLUE = (200, 30, 40), (20, 60, 180)
GREY = ((64,) * 3, (192,) * 3)
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Kind:
    """A picture whose left and right halves have one colour each."""

    file: str
    write: Callable[[Path], None]
    left: tuple[int, int, int] = RED
    right: tuple[int, int, int] = BLUE
    alpha: tuple[int, int] | None = None  # of the halves
    tolerance: int = 0
    orientation: int = 1


def halves(mode: str = "RGB", left=RED, right=BLUE, size=SIZE) -> Image.Image:
    """The picture in one of Pillow's modes."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def saver(image: Callable[[], Image.Image], **options) -> Callable[[Path], None]:
    """Write what `image` makes."""
    return lambda path: image().save(path, **options)


def exif(orientation: int) -> bytes:
    """A note of the orientation."""
    note = Image.Exif()
    note[0x0112] = orientation
    return note.tobytes()


def turned(orientation: int) -> Image.Image:
    """As a camera stores the picture under this orientation; only the turns used here."""
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    return halves().transpose(turn[orientation])


def png(depth: int, colour: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of kinds that Pillow does not write; `rows` are [H, bytes]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", *SIZE, depth, colour, 0, 0, 0)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def deep(*channels: int, right: tuple[int, ...]) -> np.ndarray:
    """Rows of 16-bit big-endian values."""
    pixels = np.empty((SIZE[1], SIZE[0], len(channels)), ">u2")
    pixels[:, : SIZE[0] // 2], pixels[:, SIZE[0] // 2 :] = channels, right
    return pixels.reshape(SIZE[1], -1).view(np.uint8)


def display_p3(gamma: float = 2.2) -> bytes:
    """An ICC profile with the primaries of Display P3 and a plain gamma."""

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))

    name = b"Wide\0"
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(79),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        **{tag: xyz(*column) for tag, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), P3.T, strict=True)},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s12x4s", at + len(body), b"none", 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp"
    )
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


# Columns: XYZ of the primaries, adapted to D50.
P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def from_p3(colour: tuple[int, int, int], gamma: float = 2.2) -> tuple[int, ...]:
    """What sRGB values show the colour that these values mean under `display_p3`."""
    linear = np.linalg.inv(SRGB) @ P3 @ (np.array(colour) / 255) ** gamma
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(int(value) for value in np.rint(encoded * 255))


def srgb_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def soft() -> Image.Image:
    """The left half is half transparent."""
    return halves("RGBA", (*RED, 128), (*BLUE, 255))


def _palette(**options) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        image = halves("P", 0, 1)
        image.putpalette([*RED, *BLUE])
        image.save(path, **options)

    return write


def _animated(path: Path) -> None:
    others = [halves(left=BLUE, right=RED)]
    halves().save(path, save_all=True, append_images=others, lossless=True)


def _text_exif(path: Path) -> None:
    note = exif(6)
    text = f"\nexif\n{len(note):8d}\n{note.hex()}\n".encode()
    data = b"Raw profile type exif\0\0" + zlib.compress(text)
    pixels = np.asarray(turned(6)).reshape(turned(6).height, -1)
    path.write_bytes(_sized(png(8, 2, pixels, (b"zTXt", data)), turned(6).size))


def _sized(content: bytes, size: tuple[int, int]) -> bytes:
    head = b"IHDR" + struct.pack(">II", *size) + content[24:29]
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


def _xmp_orientation(path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    turned(3).save(path, quality=100, subsampling=0, xmp=xmp)


def _packed(suffix: str, image: Callable[[], Image.Image], **options) -> Callable[[Path], None]:
    """Another format under this name, as files renamed by hand are."""

    def write(path: Path) -> None:
        buffer = io.BytesIO()
        image().save(buffer, suffix, **options)
        path.write_bytes(buffer.getvalue())

    return write


def _float() -> Image.Image:
    values = np.where(np.arange(SIZE[0]) < SIZE[0] // 2, 64 / 255, 192 / 255)
    return Image.fromarray(np.broadcast_to(values, SIZE[::-1]).astype(np.float32))


FINE = {"quality": 100, "subsampling": 0}
FINE_AVIF = {"quality": 100, "subsampling": "4:4:4"}
ON_WHITE = (227, 142, 147)  # RED at 128 of 255 over white
KINDS = [
    Kind("plain.png", saver(halves)),
    Kind("upper.PNG", saver(halves)),
    Kind("mixed.Png", saver(halves)),
    Kind("grey.png", saver(lambda: halves("L", 64, 192)), *GREY),
    Kind("grey_alpha.png", saver(lambda: halves("LA", (64, 255), (192, 0))), GREY[0], WHITE, (255, 0)),
    Kind("bits.png", saver(lambda: halves("1", 0, 1)), (0, 0, 0), WHITE),
    Kind("palette.png", _palette()),
    Kind("palette_trans.png", _palette(transparency=1), RED, WHITE, (255, 0)),
    Kind("palette_soft.png", _palette(transparency=b"\x80\xff"), ON_WHITE, BLUE, (128, 255), 1),
    Kind("rgba.png", saver(soft), ON_WHITE, BLUE, (128, 255), 1),
    Kind("key_colour.png", saver(halves, transparency=BLUE), RED, WHITE, (255, 0)),
    Kind("key_grey.png", saver(lambda: halves("L", 64, 192), transparency=192), GREY[0], WHITE, (255, 0)),
    Kind("deep_grey.png", lambda p: p.write_bytes(png(16, 0, deep(64 * 257, right=(192 * 257,)))), *GREY),
    Kind(
        "deep_rgb.png",
        lambda p: p.write_bytes(
            png(16, 2, deep(*(v * 257 for v in RED), right=tuple(v * 257 for v in BLUE)))
        ),
    ),
    Kind("exif6.png", saver(lambda: turned(6), exif=exif(6)), orientation=6),
    Kind("text_exif6.png", _text_exif, orientation=6),
    Kind("p3.png", saver(halves, icc_profile=display_p3()), from_p3(RED), from_p3(BLUE), None, 2),
    Kind("srgb.png", saver(halves, icc_profile=srgb_profile())),
    Kind("broken_profile.png", saver(halves, icc_profile=b"not a profile")),
    Kind("plain.jpg", saver(halves, **FINE), tolerance=3),
    Kind("progressive.jpeg", saver(halves, progressive=True, **FINE), tolerance=3),
    Kind("grey.jpg", saver(lambda: halves("L", 64, 192), quality=100), *GREY, tolerance=2),
    Kind("cmyk.jpg", saver(lambda: halves().convert("CMYK"), quality=100), tolerance=4),
    *(
        Kind(f"exif{n}.jpg", saver(lambda n=n: turned(n), exif=exif(n), **FINE), tolerance=3, orientation=n)
        for n in (3, 6, 8)
    ),
    Kind("xmp3.jpg", _xmp_orientation, tolerance=3, orientation=3),
    Kind("p3.jpg", saver(halves, icc_profile=display_p3(), **FINE), from_p3(RED), from_p3(BLUE), None, 4),
    Kind("lossy.webp", saver(halves, quality=100), tolerance=12),
    Kind("lossless.webp", saver(halves, lossless=True)),
    Kind("alpha.webp", saver(soft, lossless=True), ON_WHITE, BLUE, (128, 255), 1),
    Kind("lossy_alpha.webp", saver(soft, quality=100), ON_WHITE, BLUE, (128, 255), 12),
    Kind("exif6.webp", saver(lambda: turned(6), exif=exif(6), lossless=True), orientation=6),
    Kind("p3.webp", saver(halves, icc_profile=display_p3(), lossless=True), from_p3(RED), from_p3(BLUE), None, 2),
    Kind("animated.webp", _animated),
    Kind("plain.bmp", saver(halves)),
    Kind("palette.bmp", _palette()),
    Kind("bits.bmp", saver(lambda: halves("1", 0, 1)), (0, 0, 0), WHITE),
    Kind("plain.avif", saver(halves, **FINE_AVIF), tolerance=4),
    Kind("exif6.avif", saver(lambda: turned(6), exif=exif(6), **FINE_AVIF), tolerance=4, orientation=6),
    Kind("alpha.avif", saver(soft, **FINE_AVIF), ON_WHITE, BLUE, (128, 255), 4),
    Kind("plain.jxl", saver(halves, lossless=True)),
    Kind("alpha.jxl", saver(soft, lossless=True), ON_WHITE, BLUE, (128, 255), 1),
    Kind("noted.jxl", saver(halves, lossless=True, exif=exif(6))),  # JPEG XL's own note counts, not EXIF's
    Kind("a_tiff_of_floats.png", _packed("TIFF", _float), *GREY),
    Kind("a_gif.png", _packed("GIF", halves), tolerance=0),
]  # fmt: skip
