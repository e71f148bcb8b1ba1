"""The same picture under settings that vary: `minisd grid`.

In: prompts, and two axes of a setting's values. Out: cells, which say what each picture is made with, and the pictures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from minisd.pipeline import StableDiffusion
from minisd.sampling import FIELDS, Sampling

Axis = tuple[str, Sequence[Any]]  # a setting's name, and its values
NONE: Axis = ("", ("",))


@dataclass(frozen=True, eq=False)
class Cell:
    """One picture of a grid: its place, what varies, and all that it is made with."""

    row: int
    column: int
    varied: dict[str, Any]
    prompt: str
    sampling: Sampling
    model: str | None  # None: the grid's own
    lora: float | None  # the scale of the loaded LoRAs, where that varies


def cells(prompts: Sequence[str], sampling: Sampling, x: Axis = NONE, y: Axis = NONE) -> list[Cell]:
    """Every cell, row by row: for each prompt and value of `y` one for each value of `x`.

    `replace` as a setting: its first value is searched in the prompt, and replaced by each. Raises ValueError for a
    value that is impossible, or that is searched in vain.
    """
    rows = [(prompt, value) for prompt in prompts for value in y[1]]
    found = []
    for row, (prompt, down) in enumerate(rows):
        for column, across in enumerate(x[1]):
            varied = {name: value for name, value in ((y[0], down), (x[0], across)) if name}
            searched = [axis[1][0] for axis in (y, x) if axis[0] == "replace"]
            replaced = [value for (name, _), value in ((y, down), (x, across)) if name == "replace"]
            text = str(varied.get("prompt", prompt))
            for old, new in zip(searched, replaced, strict=True):
                if old not in text:
                    raise ValueError(f"replace={old}: is not in the prompt {text!r}")
                text = text.replace(old, new)
            own = {name: value for name, value in varied.items() if name in FIELDS}
            model, lora = varied.get("model"), varied.get("lora")
            found.append(Cell(row, column, varied, text, replace(sampling, **own), model, lora))
    return found


def pictures(
    found: Sequence[Cell], load: Callable[[str | None, float | None], StableDiffusion]
) -> Iterator[tuple[Cell, Image.Image]]:
    """Make the picture of each cell; `load` gives a model for each name and LoRA scale, whose cells come together."""
    order = sorted(found, key=lambda cell: (str(cell.model), str(cell.lora)))
    sd: StableDiffusion | None = None
    at: Any = None
    for cell in order:
        if sd is None or at != (cell.model, cell.lora):
            sd = None  # before the next one is loaded: two may not fit into the memory
            sd, at = load(cell.model, cell.lora), (cell.model, cell.lora)
        yield cell, sd.text_to_image(cell.prompt, cell.sampling)[0]


def labels(axis: Axis, before: str = "") -> list[str]:
    """What stands beside the rows, or above the columns, of an axis; `before` is said first."""
    name = axis[0].removesuffix("_scale").replace("_", " ")
    values = (f"{value:g}" if isinstance(value, float) else str(value) for value in axis[1])
    said = [", ".join(filter(None, (before, f"{name} {value}".strip()))) for value in values]
    return said if any(said) else []
