"""Recognise an emoji in a picture, by looking: no network, nothing learnt.

The figure is cut out of its ground, shrunk to 32 x 32 pixels and compared with every kept emoji as the font draws it.
The measure is Pearson's correlation of the colours, so 1 is the very emoji and 0 is nothing in common.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from emoji_data import EMOJI, GROUNDS, Figure, Scene, Studio
from PIL import Image

THUMBNAIL = 32  # pixels
DIFFERENT = 40  # a pixel this far from the ground in some colour, of 255, belongs to a figure
FEW = 0.02  # a row or column with fewer figure pixels than this share of the side is taken for noise


class Gallery:
    """Every kept emoji as a thumbnail."""

    def __init__(self, studio: Studio, size: int) -> None:
        scenes = [Scene(figures=(Figure(character=c, height=0.84, x=0.5, y=0.5),), ground="white") for c in EMOJI]
        self.characters = list(EMOJI)
        self.thumbnails = np.stack([thumbnail(studio.paint(scene, size)) for scene in scenes])

    def ranking(self, picture: Image.Image) -> list[str]:
        """All emoji, the most similar first."""
        order = np.argsort(-(self.thumbnails @ thumbnail(picture)))
        return [self.characters[i] for i in order]


def thumbnail(picture: Image.Image) -> np.ndarray:
    """The figure of a picture on white, as 3072 numbers of mean 0 and length 1."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.uint8)
    mask = figure_mask(pixels)
    box = bounding_box(mask)
    if box is None:
        return np.zeros(THUMBNAIL * THUMBNAIL * 3)
    cut = Image.fromarray(np.where(mask[..., None], pixels, 255).astype(np.uint8)).crop(box)
    side = max(cut.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    small = square.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small, dtype=float).ravel()
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


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of the figure; None if there is none."""
    columns = np.flatnonzero(mask.mean(axis=0) > FEW)
    rows = np.flatnonzero(mask.mean(axis=1) > FEW)
    if not len(columns) or not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def centre(picture: Image.Image) -> tuple[float, float]:
    """The figure's centre of mass, x and y as shares of the side; the middle if there is no figure."""
    mask = figure_mask(np.asarray(picture.convert("RGB")))
    y, x = np.nonzero(mask)
    if not len(x):
        return 0.5, 0.5
    return float(x.mean() / mask.shape[1]), float(y.mean() / mask.shape[0])


def halves(picture: Image.Image) -> Sequence[Image.Image]:
    """Left and right half."""
    middle = picture.width // 2
    return picture.crop((0, 0, middle, picture.height)), picture.crop((middle, 0, picture.width, picture.height))
