"""Contact sheets: one prompt drawn by every file (columns) at every strength (rows), as a picture and for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from PIL import Image, ImageDraw, ImageFont

from library.report.pictures import LEVELS, thumb
from library.train.contact_sheets import wrap

Json = dict[str, object]
GAP, MARGIN = 10, 20  # pixels
TITLE, LABEL = 18, 15  # font sizes
ROW_LABELS = 96  # pixels left of the pictures
CELL = (192, 512)  # least and most pixels of a picture's longer side on a sheet
INK, SOFT, PAPER = (27, 26, 24), (93, 90, 84), (251, 250, 248)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """The pictures of one prompt and seed."""

    title: str
    details: str
    columns: tuple[str, ...]  # names of files
    rows: tuple[str, ...]  # strengths
    cells: tuple[tuple[Image.Image, ...], ...]  # by row, then column; all of one size


def sheet_content(sheet: Sheet) -> Json:
    """The sheet as a page shows it."""
    side, quality = LEVELS[2]
    return {
        "title": sheet.title, "details": sheet.details, "row_name": "Strength", "rows": sheet.rows,
        "columns": sheet.columns,
        "cells": [[asdict(thumb(cell, side=side, quality=quality)) for cell in row] for row in sheet.cells],
    }  # fmt: skip


def draw_sheets(sheets: Sequence[Sheet]) -> Image.Image:
    """All sheets below each other with their labels."""
    drawn = [_draw(sheet) for sheet in sheets]
    whole = Image.new("RGB", (max(one.width for one in drawn), sum(one.height for one in drawn)), PAPER)
    top = 0
    for one in drawn:
        whole.paste(one, (0, top))
        top += one.height
    return whole


def _draw(sheet: Sheet) -> Image.Image:
    title_font, font = ImageFont.load_default(TITLE), ImageFont.load_default(LABEL)
    cells = [[_fitted(cell) for cell in row] for row in sheet.cells]
    width, height = cells[0][0].size
    inner = ROW_LABELS + len(sheet.columns) * (width + GAP)
    title = wrap(sheet.title or "(no prompt)", title_font, max(inner, 320))
    heads = [wrap(name, font, width) for name in sheet.columns]
    head_height = max(map(len, heads)) * (LABEL + 4) + GAP
    top = MARGIN + len(title) * (TITLE + 6) + LABEL + 4 + GAP
    size = (max(inner, 320) + 2 * MARGIN, top + head_height + len(cells) * (height + GAP) + MARGIN)
    sheet_picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet_picture)
    for number, line in enumerate(title):
        draw.text((MARGIN, MARGIN + number * (TITLE + 6)), line, fill=INK, font=title_font)
    draw.text((MARGIN, top - GAP - LABEL - 4), sheet.details, fill=SOFT, font=font)
    draw.text((MARGIN, top), "Strength", fill=SOFT, font=font)
    for x, lines in enumerate(heads):
        for number, line in enumerate(lines):
            left = MARGIN + ROW_LABELS + x * (width + GAP)
            draw.text((left, top + number * (LABEL + 4)), line, fill=INK, font=font)
    for y, row in enumerate(cells):
        below = top + head_height + y * (height + GAP)
        draw.text((MARGIN, below + height // 2 - LABEL), sheet.rows[y], fill=INK, font=font)
        for x, cell in enumerate(row):
            sheet_picture.paste(cell, (MARGIN + ROW_LABELS + x * (width + GAP), below))
    return sheet_picture


def _fitted(cell: Image.Image) -> Image.Image:
    side = max(cell.size)
    factor = min(max(side, CELL[0]), CELL[1]) / side
    width, height = (max(1, round(length * factor)) for length in cell.size)
    return cell.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
