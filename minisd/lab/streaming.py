"""Writing a safetensors file of any size in little memory: the header first, then one tensor after the other.

What needs no change is copied as bytes, by the operating system where it can; what needs another dtype or value is
read, changed and written alone, so that memory never holds more than one tensor.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from minisd.checkpoint.files import Files
from minisd.checkpoint.header import DTYPE_BITS, read_header
from minisd.checkpoint.reading import DTYPES, read_tensor

PIECE = 8_000_000  # bytes copied at a time
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Copy:
    """A tensor's bytes as they stand in another file."""

    path: Path
    start: int
    end: int

    def write(self, out: BinaryIO, advance: Callable[[int], object]) -> None:
        """Append the bytes to `out`, telling `advance` how many."""
        with self.path.open("rb") as file:
            position = self.start
            while position < self.end:
                position += self._piece(file, out, position, min(PIECE, self.end - position), advance)

    def _piece(self, file: BinaryIO, out: BinaryIO, at: int, count: int, advance: Callable[[int], object]) -> int:
        try:  # within the kernel: no byte comes into this process
            done = os.copy_file_range(file.fileno(), out.fileno(), count, offset_src=at)
        except (AttributeError, OSError):  # not Linux, or not between these two disks
            file.seek(at)
            done = out.write(file.read(count))
        if not done:
            raise OSError(f"{self.path}: became shorter while it was read")
        advance(done)
        return done


@dataclass(frozen=True)
class Made:
    """A tensor that is computed when its turn comes."""

    make: Callable[[], Tensor]

    def write(self, out: BinaryIO, advance: Callable[[int], object]) -> None:
        """Append the values to `out`."""
        data = self.make().contiguous().view(torch.uint8).flatten().numpy()
        out.write(data.data)
        advance(data.nbytes)


@dataclass(frozen=True)
class Entry:
    """One tensor of the new file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Copy | Made

    @property
    def bytes(self) -> int:
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def entry(files: Files, source: str, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Entry:
    """The tensor `source` of `files` as `name`, in `shape`; floating point is cast to `dtype` unless that is None."""
    info = files.tensors[source]
    if dtype is None or info.dtype not in DTYPES or DTYPES[info.dtype] == dtype:
        return Entry(name, info.dtype, shape, Copy(files.location[source], info.start, info.end))

    def cast() -> Tensor:
        # A tensor without dimensions cannot be seen as bytes.
        return read_tensor(files, source).to(dtype).reshape(shape or (1,))

    return Entry(name, NAMES[dtype], shape, Made(cast))


def write_file(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str], advance: Callable[[int], object] = lambda _: None
) -> None:
    """Write a safetensors file, then read its header back. Raises ValueError for a name that comes twice."""
    if len({one.name for one in entries}) != len(entries):
        raise ValueError(f"{path}: a name would be there twice")
    header, position = described(entries, metadata)
    with path.open("wb", buffering=0) as out:
        out.write(header)
        for one in entries:
            one.values.write(out, advance)
        out.flush()
        os.fsync(out.fileno())
    size = len(header) + position
    if path.stat().st_size != size or len(read_header(path).tensors) != len(entries):
        raise OSError(f"{path}: was not written as planned: {path.stat().st_size:,} bytes instead of {size:,}")


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
