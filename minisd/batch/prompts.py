"""Files of prompts -> rows: what to make, and with which settings of its own.

In: `.txt` (a prompt a line), `.csv`, `.jsonl` or `.parquet`, with a column `prompt` and any of the others. An
unreadable row raises ValueError with its line.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisd.files import read_text, shown

# Column -> the kind of its values. A column `size`, "512x768" (width x height), stands for two of them.
COLUMNS: dict[str, Callable[[Any], Any]] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "steps": int,
    "guidance_scale": float,
    "width": int,
    "height": int,
}
ALIASES = {"negative": "negative_prompt", "guidance": "guidance_scale"}


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt; None: as for all rows."""

    line: int
    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None


def read_prompts(path: Path) -> list[Row]:
    """All rows of a file. Raises ValueError with the line of one that cannot be read, FileNotFoundError for no file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of prompts")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: must end in {', '.join(READERS)}")
    rows = []
    line = 0
    try:
        for line, fields in READERS[path.suffix.lower()](path):
            rows.append(row_of(line, fields))
    except (ValueError, TypeError, csv.Error) as error:
        where = f"line {line}: " if line else ""
        raise ValueError(f"{path}, {where}{error}" if where else str(error)) from None
    if not rows:
        raise ValueError(f"{path}: holds no prompt")
    return rows


def row_of(line: int, fields: Any) -> Row:
    """The row of these fields; empty ones are left out. Raises ValueError for what cannot be meant."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{shown(fields, 60)}: must be an object with a prompt")
    given = {ALIASES.get(name, str(name)): value for name, value in fields.items() if value not in (None, "")}
    if "size" in given:
        given["width"], _, given["height"] = str(given.pop("size")).lower().partition("x")
        given["height"] = given["height"] or given["width"]
    if strange := [name for name in given if name not in COLUMNS]:
        raise ValueError(f"column {shown(strange[0], 40)!r}: must be one of {', '.join(COLUMNS)}, size")
    if not isinstance(given.setdefault("prompt", fields.get("prompt")), str):
        raise ValueError("has no prompt")
    values = {name: converted(name, value) for name, value in given.items()}
    return Row(line, **values)


def converted(name: str, value: Any) -> Any:
    """A value as its column's kind. Raises ValueError for one that is not."""
    kind = COLUMNS[name]
    if kind is str:
        return str(value)
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = -1
    if isinstance(value, bool) or number < 0 or number != float(value):
        raise ValueError(f"{name}={shown(value, 40)}: must be a {'whole ' if kind is int else ''}number, 0 or more")
    return number


def lines_of(path: Path) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(read_text(path, 1 << 40).splitlines(), 1):
        if text.strip():
            yield line, {"prompt": text.strip()}


def csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if "prompt" not in (reader.fieldnames or ()):
            raise ValueError(f"{path}: has no column 'prompt' in its first line")
        for row in reader:
            if None in row:
                raise ValueError(f"{path}, line {reader.line_num}: has more fields than the first line has names")
            yield reader.line_num, row


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(read_text(path, 1 << 40).splitlines(), 1):
        if text.strip():
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {line}: is not JSON ({error})") from None
            yield line, fields


def parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ImportError:
        raise ValueError(f"{path}: needs pyarrow; pip install 'minisd[batch]'") from None
    try:
        rows: Iterable[Any] = read_table(path).to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    yield from enumerate(rows, 1)


READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".txt": lines_of,
    ".csv": csv_rows,
    ".jsonl": json_rows,
    ".parquet": parquet_rows,
}
