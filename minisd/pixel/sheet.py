"""Pictures with names beside their rows and above their columns -> one picture, to look at."""

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

LETTER = 6  # pixels of width of a letter, about
LINE = 14  # pixels of height of a line
BESIDE = 90  # pixels for the names of rows, at least


def sheet(pictures: Sequence[Image.Image], names: Sequence[str], above: Sequence[str] = ()) -> Image.Image:
    """Pictures in a row for each name, beside it, `above` the columns' names; without names nearly as a square."""
    larger = max(1, 64 // pictures[0].width)  # small pictures are hard to see
    pictures = [picture.resize((picture.width * larger, picture.height * larger), 0) for picture in pictures]
    columns = len(above) or (len(pictures) // len(names) if names else math.ceil(math.sqrt(len(pictures))))
    rows, (width, height) = -(-len(pictures) // columns), pictures[0].size
    beside = [lines(name, 30) for name in names]
    heads = [lines(name, width // LETTER) for name in above]
    longest = max((len(line) for text in beside for line in text.split("\n")), default=0)
    margin = max(BESIDE, LETTER * longest + 16) if names else 0
    top = LINE * (max((text.count("\n") + 1 for text in heads), default=-1) + 1)
    made = Image.new("RGB", (margin + columns * width, top + rows * height), "white")
    for index, picture in enumerate(pictures):
        made.paste(picture, (margin + index % columns * width, top + index // columns * height))
    pen = ImageDraw.Draw(made)
    for row, text in enumerate(beside):
        pen.text((margin - 8, top + (row + 0.5) * height), text, fill="black", anchor="rm", align="right")
    for column, text in enumerate(heads):
        pen.text((margin + (column + 0.5) * width, top / 2), text, fill="black", anchor="mm", align="center")
    return made


def lines(text: str, width: int) -> str:
    """`text` in lines of at most so many letters."""
    return "\n".join(textwrap.wrap(text, max(4, width)))
