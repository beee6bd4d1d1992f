"""From a picture's file to upright 8-bit RGB, and its alpha channel.

Unlike Kohya's, these pixels honour EXIF orientation, scale deep grey instead of clipping it, lay transparent
pictures on white instead of showing the colours hidden under the transparency, and are brought to sRGB where the
picture carries another colour profile, as every viewer shows it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from library.data import formats
from library.data.buckets import Size
from library.data.headers import READ_ERRORS, WITH_ALPHA, orientation_of
from library.data.resize import Pixels
from library.errors import DatasetError

PIXELS_VERSION = 2  # part of every cache entry's fingerprint; rises when the same file gives other pixels
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_GREY = {"I;16", "I;16B", "I;16L", "I;16N", "I", "F"}
_PROFILED = {"RGB", "L", "CMYK"}  # modes a colour profile is applied to as they are


@dataclass(frozen=True, slots=True)
class Picture:
    """Decoded pixels, upright; transparent ones already lie on white."""

    rgb: Pixels  # [H, W, 3]
    alpha: Pixels | None  # [H, W]

    @property
    def size(self) -> Size:
        """Width and height."""
        return (self.rgb.shape[1], self.rgb.shape[0])


class Undecodable(DatasetError):
    """A picture's header could be read but its pixels cannot."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        self.what = f"cannot be decoded ({reason})"
        super().__init__(f"{path} {self.what}; replace or remove it")

    def __reduce__(self) -> tuple[type[Undecodable], tuple[Path, str]]:
        return Undecodable, (self.path, self.reason)  # it may come from a loader's process


def read_picture(path: Path) -> Picture:
    """Decode the first frame. Raises Undecodable."""
    formats.readable()
    try:
        with Image.open(path) as image:
            orientation = orientation_of(image)
            rgb, alpha = _decode(image)
    except READ_ERRORS as error:
        raise Undecodable(path, str(error)) from error
    upright = np.asarray(_turned(rgb, orientation))
    return Picture(upright, np.asarray(_turned(alpha, orientation)) if alpha is not None else None)


def read_mask(path: Path) -> Pixels:
    """[H, W]: the red channel of a mask picture as it is stored, upright. Raises Undecodable.

    A mask's values are weights, not colours: neither profile nor transparency changes them.
    """
    formats.readable()
    try:
        with Image.open(path) as image:
            orientation = orientation_of(image)
            red = _grey(image) if image.mode in _DEEP_GREY else image.convert("RGB").getchannel("R")
    except READ_ERRORS as error:
        raise Undecodable(path, str(error)) from error
    return np.asarray(_turned(red, orientation))


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _decode(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """RGB laid on white, and the alpha channel if there is one."""
    image.load()
    if image.mode in _DEEP_GREY:
        return _grey(image).convert("RGB"), None
    profile = image.info.get("icc_profile")
    if image.mode not in WITH_ALPHA and "transparency" not in image.info:
        return _in_srgb(image, profile), None
    full = image.convert("RGBA")
    alpha = full.getchannel("A")
    full = _in_srgb(full.convert("RGB"), profile)
    full.putalpha(alpha)
    white = Image.new("RGBA", full.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, full).convert("RGB"), alpha


def _grey(image: Image.Image) -> Image.Image:
    """8-bit grey from 0..65535, or from floats in 0..1 (0..255 where any is larger)."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        values = np.nan_to_num(values)
        scale = 255.0 if values.max(initial=0.0) <= 1 else 1.0
    else:
        scale = 255 / 65535
    return Image.fromarray(np.rint((values * scale).clip(0, 255)).astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB, with the colours that the profile says; as they are without one, or with one that does not fit."""
    image = image if image.mode in _PROFILED else image.convert("RGB")
    transform = _transform(profile, image.mode) if profile else None
    if transform is None:
        return image.convert("RGB")
    converted: Image.Image = transform.apply(image)
    return converted


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None if it is sRGB, broken, or of another colour model than the picture."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return None
