"""debug_dataset: every sample of the first epoch, in words on the screen and as pictures on contact sheets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from torch import Tensor

from library.config.dataset_settings import DatasetSettings
from library.config.sections.caching import CachingConfig
from library.data.dataset import TrainingData
from library.data.inspection import BucketView, SampleView, first_epoch
from library.files.atomic import replacing
from library.train.prepare import Data

FOLDER = "debug_dataset"
COLUMNS, ROWS = 5, 4
TILE = 320  # pixels of a picture's longer side on a sheet; larger pictures are shrunk
GAP = 12  # pixels
FONT_SIZE = 13
CAPTION_LINES = 6
GREY = 0.5  # what stands where a mask keeps the loss from looking
INK, PAPER = (20, 20, 20), (255, 255, 255)


def show_dataset(data: Data, caching: CachingConfig, folder: Path, console: Console) -> list[Path]:
    """Print the samples of the first epoch by bucket and draw them into `folder`. Returns the sheets' paths."""
    sheets = []
    for bucket in first_epoch(_as_cached(data.training, caching), data.plan):
        width, height = bucket.bucket
        stem = f"dataset{bucket.dataset + 1}_{width:04d}x{height:04d}"
        _print(
            console, f"dataset {bucket.dataset + 1}, bucket {width}x{height}: {bucket.num_samples} samples"
        )
        for number, views in enumerate(_chunks(_told(bucket, console), COLUMNS * ROWS), start=1):
            path = folder / f"{stem}_{number:03d}.png"
            with replacing(path) as temporary:
                draw_sheet(views).save(temporary)
            sheets.append(path)
    _print(console, f"{len(sheets)} contact sheets in {folder}")
    return sheets


def describe(view: SampleView) -> str:
    """One sample in one line: image, what of it is shown, whether mirrored, caption."""
    framing = view.framing
    (left, top), (width, height) = framing.offset, framing.bucket
    parts = [
        str(view.record.path),
        f"{view.record.size[0]}x{view.record.size[1]} -> {framing.resized[0]}x{framing.resized[1]}",
        f"crop {left},{top},{left + width},{top + height}",
        *(["flipped"] if view.flipped else []),
        *(["masked"] if view.mask is not None else []),
        *(["regularisation"] if view.record.is_reg else []),
        f'"{view.caption}"',
    ]
    return "  ".join(parts)


def draw_sheet(views: Sequence[SampleView]) -> Image.Image:
    """The pictures of one bucket in rows, as the model gets them, each above its caption."""
    font = ImageFont.load_default(FONT_SIZE)
    tiles = [as_picture(view) for view in views]
    width, height = tiles[0].size
    texts = [wrap(view.caption or "(no caption)", font, width) for view in views]
    line = FONT_SIZE + 4
    cell = (width + GAP, height + line * max(len(text) for text in texts) + GAP)
    columns, rows = min(COLUMNS, len(tiles)), -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        left, top = GAP + number % COLUMNS * cell[0], GAP + number // COLUMNS * cell[1]
        sheet.paste(tile, (left, top))
        for row, words in enumerate(text):
            draw.text((left, top + height + 2 + row * line), words, fill=INK, font=font)
    return sheet


def as_picture(view: SampleView) -> Image.Image:
    """The tensor that is trained on, as a picture; what the mask hides from the loss fades into grey."""
    pixels: Tensor = (view.image + 1) / 2  # [3, H, W] in 0..1
    if view.mask is not None:
        pixels = pixels * view.mask + GREY * (1 - view.mask)
    array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    picture.thumbnail((TILE, TILE))
    return picture


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """`text` in at most CAPTION_LINES lines of `width` pixels; a word that is longer is cut where it must be."""
    lines = [""]
    for word in text.split():
        for piece in _pieces(word, font, width):
            joined = f"{lines[-1]} {piece}".strip()
            if font.getlength(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    lines = [line for line in lines if line]
    return (
        lines
        if len(lines) <= CAPTION_LINES
        else [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1] + "…"]
    )


def _pieces(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> Iterator[str]:
    piece = ""
    for letter in word:
        if piece and font.getlength(piece + letter) > width:
            yield piece
            piece = ""
        piece += letter
    yield piece


def _told(bucket: BucketView, console: Console) -> Iterator[SampleView]:
    for view in bucket.samples:
        _print(console, f"  {describe(view)}")
        yield view


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _chunks(items: Iterable[SampleView], size: int) -> Iterator[list[SampleView]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _as_cached(data: TrainingData, caching: CachingConfig) -> TrainingData:
    """The data as training reads it: cached latents are of the plain crop, whatever faces there are."""
    datasets = (
        tuple(_without_face_crops(one) for one in data.datasets) if caching.cache_latents else data.datasets
    )
    return replace(data, datasets=datasets)


def _without_face_crops(dataset: DatasetSettings) -> DatasetSettings:
    subsets = tuple(replace(subset, face_crop_aug_range=None) for subset in dataset.subsets)
    return replace(dataset, subsets=subsets)
