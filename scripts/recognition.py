"""Recognise an emoji in a picture, by looking: no network, nothing learned.

The figure is cut out of its ground, shrunk to 32 x 32 pixels and compared with every kept emoji as the font draws it.
The measure is Pearson's correlation of the colours, so 1 is the very emoji and 0 is nothing in common.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from emoji_data import EMOJI, GROUNDS, Figure, Scene, Studio
from PIL import Image

THUMBNAIL = 32  # pixels
DIFFERENT = 40  # a pixel this far from the ground in some colour, of 255, belongs to a figure
FEW = 0.02  # a row or column with fewer figure pixels than this share of the side is taken for noise


class Gallery:
    """Every kept emoji as a thumbnail."""

    def __init__(self, figures: Sequence[Image.Image]) -> None:
        """`figures` of 32 x 32 pixels on white, in the order of EMOJI."""
        self.thumbnails = np.stack([normalised(figure) for figure in figures])

    @classmethod
    def draw(cls, studio: Studio, size: int) -> Gallery:
        """The gallery of a font."""
        return cls(paint_figures(studio, size))

    @classmethod
    def read(cls, sheet: Path) -> Gallery:
        """A gallery that `save_sheet` wrote: no font needed."""
        picture = Image.open(sheet).convert("RGB")
        rows, columns = picture.height // THUMBNAIL, picture.width // THUMBNAIL
        corners = [(THUMBNAIL * column, THUMBNAIL * row) for row in range(rows) for column in range(columns)]
        return cls([picture.crop((x, y, x + THUMBNAIL, y + THUMBNAIL)) for x, y in corners[: len(EMOJI)]])

    def ranking(self, picture: Image.Image) -> list[str]:
        """All emoji, the most similar first."""
        order = np.argsort(-(self.thumbnails @ normalised(figure_of(picture))))
        return [list(EMOJI)[i] for i in order]


def paint_figures(studio: Studio, size: int) -> list[Image.Image]:
    """Every emoji cut out of a picture of `size` pixels."""
    scenes = [Scene(figures=(Figure(character=c, height=0.84, x=0.5, y=0.5),), ground="white") for c in EMOJI]
    return [figure_of(studio.draw(scene, size)) for scene in scenes]


def save_sheet(figures: Sequence[Image.Image], path: Path, columns: int = 16) -> None:
    """Write figures as one picture, for `Gallery.read`."""
    sheet = Image.new("RGB", (columns * THUMBNAIL, -(-len(figures) // columns) * THUMBNAIL), "white")
    for i, figure in enumerate(figures):
        sheet.paste(figure, (i % columns * THUMBNAIL, i // columns * THUMBNAIL))
    sheet.save(path, optimize=True)


def figure_of(picture: Image.Image) -> Image.Image:
    """The figure of a picture on white, 32 x 32 pixels."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.uint8)
    mask = figure_mask(pixels)
    cut = Image.fromarray(np.where(mask[..., None], pixels, 255).astype(np.uint8)).crop(bounding_box(mask))
    side = max(cut.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)


def normalised(figure: Image.Image) -> np.ndarray:
    """A figure as 3072 numbers of mean 0 and length 1 (all 0 if it is of one colour)."""
    values = np.asarray(figure, dtype=float).ravel()
    values -= values.mean()
    return values / (np.linalg.norm(values) or 1.0)


def ground_colour(pixels: np.ndarray) -> np.ndarray:
    """The median colour of the two outermost pixels on all four sides."""
    edge = [pixels[:2], pixels[-2:], pixels[:, :2].swapaxes(0, 1), pixels[:, -2:].swapaxes(0, 1)]
    return np.median(np.concatenate([part.reshape(-1, 3) for part in edge]), axis=0)


def nearest_ground(picture: Image.Image) -> str:
    """Which of the nine grounds a picture has."""
    colour = ground_colour(np.asarray(picture.convert("RGB")))
    return min(GROUNDS, key=lambda name: np.abs(colour - GROUNDS[name]).sum())


def figure_mask(pixels: np.ndarray) -> np.ndarray:
    """True (H, W) where a pixel is not ground."""
    return np.abs(pixels.astype(float) - ground_colour(pixels)).max(axis=2) > DIFFERENT


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the figure; the whole picture if there is none."""
    columns = np.flatnonzero(mask.mean(axis=0) > FEW)
    rows = np.flatnonzero(mask.mean(axis=1) > FEW)
    if not len(columns) or not len(rows):
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def centre(picture: Image.Image) -> tuple[float, float]:
    """The figure's centre of mass, x and y as shares of the side; the middle if there is no figure."""
    mask = figure_mask(np.asarray(picture.convert("RGB")))
    y, x = np.nonzero(mask)
    if not len(x):
        return 0.5, 0.5
    return float(x.mean() / mask.shape[1]), float(y.mean() / mask.shape[0])


def half(picture: Image.Image, place: str) -> Image.Image:
    """The half of a picture that is "on the left", "on the right", "at the top" or "at the bottom"."""
    width, height = picture.size
    boxes = {
        "on the left": (0, 0, width // 2, height),
        "on the right": (width // 2, 0, width, height),
        "at the top": (0, 0, width, height // 2),
        "at the bottom": (0, height // 2, width, height),
    }
    return picture.crop(boxes[place])


if __name__ == "__main__":
    save_sheet(paint_figures(Studio(), 128), Path(sys.argv[1]))
