"""Files that the commands write: their names, PNGs with their settings inside, grids, and what is said about them."""

import io
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from PIL import Image

from minisd.files import write_whole
from minisd.metadata.writing import signed


@dataclass
class Paths:
    """Where the pictures go: one path a picture, and one for the grid where there are several."""

    output: Path
    images: list[Path] = field(default_factory=list)

    @property
    def grid(self) -> Path | None:
        return self.output if len(self.images) > 1 else None


def plan_paths(output: str | None, prompt: str, seed: int, images: int) -> Paths:
    """Choose the file names, and make sure now that they can be written."""
    if output is None:
        output = f"{name_of(prompt)}-{seed}.png"
    path = png_path(output)
    digits = len(str(images))
    singles = [path.with_name(f"{path.stem}-{number:0{digits}}.png") for number in range(1, images + 1)]
    paths = Paths(path, singles if images > 1 else [path])
    for taken in [path, *paths.images]:
        check_no_folder(taken)
    return paths


def name_of(prompt: str) -> str:
    """A file's name after a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"


def png_path(output: str) -> Path:
    """The path of a PNG file that can be written. Raises ValueError otherwise."""
    path = Path(os.path.expanduser(output))
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: the name must end in .png (PNG files carry their settings)")
    check_folder(path.parent / "x")
    check_no_folder(path)
    return path


def check_no_folder(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")


def check_folder(path: Path) -> None:
    """Raise ValueError unless `path` can be made, or is a folder that can be written to."""
    folder = path if path.is_dir() else path.parent
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: exists and is not a folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder to write to")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written to ({error.strerror})") from None


def make_grid(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size -> one picture, in rows that are about as many as the columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, rows * height))
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % columns * width, index // columns * height))
    return grid


def write_png(path: Path, picture: Image.Image, parameters: str, record: Mapping[str, Any] | None = None) -> None:
    """Write a PNG with its settings, and the record of what makes it again."""
    write_picture(path, signed(picture, parameters, record), format="PNG")


def write_picture(path: Path, picture: Image.Image, **how: Any) -> None:
    """Write a picture whole or not at all; `how` is Pillow's."""
    data = io.BytesIO()
    picture.save(data, **how)
    write_whole(path, data.getvalue())


def report(written: list[Path], told: dict[str, Any], as_json: bool) -> None:
    """Say what was written: paths, the main one last; or everything as JSON."""
    if as_json:
        print(json.dumps(told))
        return
    for path in written:
        try:
            print(path)
        except UnicodeEncodeError:  # a path is bytes, and need not be text in the terminal's encoding
            click.echo(os.fsencode(path))
