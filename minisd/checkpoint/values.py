"""The values behind the headers: whole tensors, memory-mapped, or a few rows at a time.

`Values` reads a component's weights under minisd's names, in the model's shapes, 8-bit floats times their scale.
Nothing is read before it is asked for.
"""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minisd.checkpoint.header import Files, fused_name, is_turned
from minisd.checkpoint.naming import Match
from minisd.files import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
PIECE = 250_000  # elements that are in memory at a time, where rows are read


def memory_mapped(path: Path) -> Any:
    """The open file. Raises CheckpointError where safetensors will not have it: a path that is not UTF-8, say."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def read_tensor(files: Files, name: str) -> Tensor:
    with memory_mapped(files.location[name]) as file:
        return tensor_of(file, name)


def tensor_of(file: Any, name: str) -> Tensor:
    """A tensor of an open file, or a third of one."""
    whole, third = fused_name(name)
    tensor: Tensor = file.get_tensor(whole)
    if is_turned(name):
        return tensor.T.contiguous()
    return tensor if third is None else tensor.chunk(3)[third]


class Values(Mapping[str, Tensor]):
    """A component's weights: minisd's name -> tensor, in the model's shape. Every file is opened once."""

    def __init__(self, files: Files, match: Match) -> None:
        self.files, self.match = files, match
        self._opened: dict[Path, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.match.sources)

    def __len__(self) -> int:
        return len(self.match.sources)

    def __contains__(self, name: object) -> bool:
        return name in self.match.sources  # a Mapping would read the weight to find out

    def __getitem__(self, name: str) -> Tensor:
        source, shape = self.match.sources[name]
        return self._scaled(name, self._stored(source).reshape(shape), slice(None))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of `self[name]`. Arithmetic knows no 8-bit floats: they come as float32, which holds them."""
        stored = DTYPES[self.files.tensors[self.match.sources[name][0]].dtype]
        return torch.float32 if stored in EIGHT_BITS else stored

    def shape(self, name: str) -> tuple[int, ...]:
        return self.match.sources[name][1]

    def pieces(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """A weight as runs of rows, PIECE elements or one row each: (which rows, their values).

        Read, not memory-mapped: of a file of any size no more than a piece is ever in memory.
        """
        source, shape = self.match.sources[name]
        if is_turned(source):
            yield slice(None), self[name]
            return
        info = self.files.tensors[source]
        dtype = DTYPES[info.dtype]
        row = prod(shape[1:])
        most = max(1, PIECE // max(1, row))
        with self.files.location[source].open("rb") as file:
            file.seek(info.start)
            for first in range(0, shape[0], most):
                rows = slice(first, min(first + most, shape[0]))
                count = (rows.stop - first) * row
                data = bytearray(count * dtype.itemsize)
                if file.readinto(data) != len(data):
                    raise OSError(f"{self.files.path}: became shorter while it was read")
                values = torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)
                yield rows, self._scaled(name, values.reshape(-1, *shape[1:]), rows)

    def _stored(self, source: str) -> Tensor:
        path = self.files.location[source]
        if path not in self._opened:
            self._opened[path] = memory_mapped(path)
        return tensor_of(self._opened[path], source)

    def _scaled(self, name: str, values: Tensor, rows: slice) -> Tensor:
        if values.dtype in EIGHT_BITS:
            values = values.float()
        if name not in self.match.scales:
            return values
        scale = self._stored(self.match.scales[name]).float().flatten()
        if len(scale) > 1:  # one for each row
            scale = scale[rows]
        return values * scale.reshape(-1, *[1] * (values.ndim - 1))
