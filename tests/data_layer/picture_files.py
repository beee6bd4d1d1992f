"""Small image folders for the tests of the data layer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parents[1] / "data" / "data_layer"


def golden(name: str):
    """One of the recorded JSON files."""
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def write_picture(
    path: Path, size: tuple[int, int], *, mode: str = "RGB", orientation: int = 1, value: int = 90
) -> Path:
    """A picture with a gradient, so that crops, flips and turns show."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    rgb = np.stack([across, down, np.full_like(across, value)], axis=2).round().astype(np.uint8)
    image = Image.fromarray(rgb).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation == 1:
        image.save(path)
    else:
        image.save(path, exif=exif)
    return path


def write_tree(root: Path) -> Path:
    """The recorded folder tree: its texts as they were, its pictures by size only."""
    for name, entry in golden("tree").items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "size" in entry:
            Image.new("1", tuple(entry["size"])).convert("RGB").save(path)
        else:
            path.write_bytes(entry["text"].encode("utf-8"))
    return root
