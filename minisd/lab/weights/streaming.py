"""Writing a safetensors file of any size in little memory: the header first, then one tensor after the other.

What needs no change is copied as bytes, by the operating system where it can; what needs another dtype or value is
read, changed and written alone, so that memory never holds more than one tensor.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from minisd.checkpoint.header import DTYPE_BITS, Files, by_whole, is_turned, read_header
from minisd.checkpoint.values import DTYPES, Values

PIECE = 1_000_000  # bytes copied at a time: what fits into a processor's cache is copied fastest
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Copy:
    """A tensor's bytes as they stand in another file."""

    path: Path
    start: int
    end: int

    def write(self, out: BinaryIO, advance: Callable[[int], object]) -> None:
        """Append the bytes to `out`, telling `advance` how many."""
        piece = memoryview(bytearray(min(PIECE, self.end - self.start)))
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for position in range(self.start, self.end, PIECE):
                part = piece[: min(PIECE, self.end - position)]
                if file.readinto(part) != len(part):
                    raise OSError(f"{self.path}: became shorter while it was read")
                advance(out.write(part))


@dataclass(frozen=True)
class Made:
    """A tensor that is computed when its turn comes, in pieces that follow each other."""

    make: Callable[[], Iterable[Tensor]]

    def write(self, out: BinaryIO, advance: Callable[[int], object]) -> None:
        """Append the values to `out`."""
        for piece in self.make():
            data = piece.contiguous().flatten().view(torch.uint8).numpy()
            out.write(data.data)
            advance(data.nbytes)


@dataclass(frozen=True)
class Joined:
    """Several, one behind the other."""

    parts: "Sequence[Copy | Made | Joined]"

    def write(self, out: BinaryIO, advance: Callable[[int], object]) -> None:
        """Append all bytes to `out`."""
        for part in self.parts:
            part.write(out, advance)


@dataclass(frozen=True)
class Entry:
    """One tensor of the new file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: "Copy | Made | Joined"

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def copied(files: Files, source: str, name: str, shape: tuple[int, ...]) -> Entry:
    """The tensor `source` of `files` as it is, under another name and in another shape of as many values."""
    info = files.tensors[source]
    return Entry(name, info.dtype, shape, Copy(files.location[source], info.start, info.end))


def weight(values: Values, ours: str, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Entry:
    """The weight `ours` under another name and in another shape; cast to `dtype` unless that is None.

    What has a scale is written multiplied by it: its name in the new file could not say that it is scaled.
    """
    source, _ = values.match.sources[ours]
    if is_turned(name):
        return turned(values, ours, name, dtype)
    stored = DTYPES[values.files.tensors[source].dtype]
    if dtype in (None, stored) and ours not in values.match.scales and not is_turned(source):
        return copied(values.files, source, name, shape)
    wanted = dtype or values.dtype(ours)
    return Entry(name, NAMES[wanted], shape, Made(lambda: (piece.to(wanted) for _, piece in values.pieces(ours))))


def turned(values: Values, ours: str, name: str, dtype: torch.dtype | None) -> Entry:
    """The weight `ours`, a matrix, transposed, as the file of this name has it."""
    wanted = dtype or values.dtype(ours)
    return Entry(name, NAMES[wanted], values.shape(ours)[::-1], Made(lambda: [values[ours].T.to(wanted)]))


def write_file(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], advance: Callable[[int], object] = lambda _: None
) -> None:
    """Write a safetensors file, then read its header back. Raises ValueError for a name that comes twice."""
    if len({one.name for one in entries}) != len(entries):
        raise ValueError(f"{path}: a name would be there twice")
    entries = fused(entries)
    header, position = described(entries, metadata)
    with path.open("wb", buffering=0) as out:
        out.write(header)
        for one in entries:
            one.values.write(out, advance)
    size = len(header) + position
    if path.stat().st_size != size or len(read_header(path).tensors) != len(entries):
        raise OSError(f"{path}: was not written as planned: {path.stat().st_size:,} bytes instead of {size:,}")


def fused(entries: Sequence[Entry]) -> list[Entry]:
    """The same, the thirds of one tensor (OpenCLIP's queries, keys and values) joined. All have one dtype."""
    return [
        replace(group[0], name=name) if len(group) == 1 else joined(name, group)
        for name, group in by_whole({one.name: one for one in entries}).items()
    ]


def joined(name: str, parts: Sequence[Entry]) -> Entry:
    """Tensors of one dtype as one, their rows behind each other."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Entry(name, parts[0].dtype, shape, Joined([part.values for part in parts]))


def described(entries: Iterable[Entry], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """The header's bytes, and how many bytes of values follow."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for one in entries:
        table[one.name] = {
            "dtype": one.dtype,
            "shape": list(one.shape),
            "data_offsets": [position, position + one.bytes],
        }
        position += one.bytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text, position
