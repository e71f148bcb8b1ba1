"""Pictures by class -> one picture, to look at."""

import math

from PIL import Image, ImageDraw


def sheet(pictures: list[Image.Image], names: list[str]) -> Image.Image:
    """Pictures in a row for each name, beside it; without names about as many rows as columns."""
    larger = max(1, 64 // pictures[0].width)  # small pictures are hard to see
    pictures = [picture.resize((picture.width * larger, picture.height * larger), 0) for picture in pictures]
    columns = len(pictures) // len(names) if names else math.ceil(math.sqrt(len(pictures)))
    rows, (width, height), margin = -(-len(pictures) // columns), pictures[0].size, 90 if names else 0
    made = Image.new("RGB", (margin + columns * width, rows * height), "white")
    for index, picture in enumerate(pictures):
        made.paste(picture, (margin + index % columns * width, index // columns * height))
    pen = ImageDraw.Draw(made)
    for row, name in enumerate(names):
        pen.text((margin - 8, (row + 0.5) * height), name, fill="black", anchor="rm")
    return made
