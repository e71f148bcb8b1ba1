"""Small helpers that programs take from `diffusers.utils`: images from files, sheets of images, logging."""

import os
from collections.abc import Callable, Sequence

from PIL import Image, ImageOps

from minisd.diffusers.outputs import Output as BaseOutput
from minisd.diffusers.refusing import NotCoveredError
from minisd.diffusers.utils import logging

__all__ = ["BaseOutput", "is_xformers_available", "load_image", "logging", "make_image_grid"]


def load_image(
    image: str | os.PathLike[str] | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """An image from a file, upright, in mode "RGB" or as `convert_method` makes it. Images are taken as they are.

    Raises NotCoveredError for addresses: nothing is fetched here. Raises ValueError for what is no image.
    """
    if isinstance(image, str | os.PathLike):
        if "://" in os.fspath(image):
            raise NotCoveredError(
                "load_image: addresses are not covered by minisd.diffusers: give a file on this machine"
            )
        if not os.path.isfile(image):
            raise ValueError(f"{image}: is no file")
        image = Image.open(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"image: must be a path or a PIL image, not {type(image).__name__}")
    upright = ImageOps.exif_transpose(image)
    return upright.convert("RGB") if convert_method is None else convert_method(upright)


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """`rows` times `cols` images on one sheet, row by row; `resize`: their new height and width in pixels."""
    if len(images) != rows * cols:
        raise ValueError(f"images: {len(images)}; must be {rows} * {cols}")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    sheet = Image.new("RGB", (cols * width, rows * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % cols * width, index // cols * height))
    return sheet


def is_xformers_available() -> bool:
    """No: torch's own attention saves the memory."""
    return False
