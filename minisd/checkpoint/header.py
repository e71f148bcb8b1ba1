"""The header of a safetensors file: names, dtypes and shapes, without reading one value.

A file is 8 bytes of length (little-endian), that many bytes of JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Files come from the internet, so every claim is checked against
the file's size before anything is allocated. A large component may stand in several files, shards, with an index that
names them. This file needs the standard library only. Next: `naming.py`.
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from minisd.files import CheckpointError, check_regular, read_json_object, shown

MAX_HEADER = 100_000_000  # bytes, the format's own limit
MAX_AXES = 64  # torch's limit; the product of a million sizes would take minutes

# dtype -> bits of one element
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

WAY_OUT = "`minisd convert --from-pickle` makes safetensors of it and runs nothing"

# What people find instead of a safetensors file, by its first bytes.
IMPOSTORS = (
    (b"version https://git-lfs", "a git-LFS pointer, not the weights: fetch the real file with `git lfs pull`"),
    (b"<!doctype html", "a web page (HTML), not weights: the download went wrong"),
    (b"<html", "a web page (HTML), not weights: the download went wrong"),
    (b"gguf", "a GGUF file: quantised weights that minisd does not read"),
    (b"pk\x03\x04", f"a zip, probably a PyTorch pickle, which may run code when opened: {WAY_OUT}"),
    (b"\x80", f"a pickle, which may run code when opened: {WAY_OUT}"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor. `start` and `end` count bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What one file says of its tensors, before any value is read."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of the safetensors file at `path`.

    Raises FileNotFoundError where there is nothing, and CheckpointError for anything that is not a whole, consistent
    safetensors file.
    """
    path = Path(path)
    size = check_regular(path, "a safetensors file")
    try:
        with path.open("rb") as file:
            return parse_header(path, file.read(8), file, size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def parse_header(path: Path, first: bytes, file: BinaryIO, size: int) -> Header:
    """Parse the header that follows the `first` 8 bytes of the open `file`, `size` bytes long."""
    beginning = first + file.read(32)
    for magic, explanation in IMPOSTORS:
        if beginning.lower().lstrip().startswith(magic) and not beginning[8:9] == b"{":
            raise CheckpointError(f"{path}: is {explanation}")
    if size == 0:
        raise CheckpointError(f"{path}: is empty")
    if size < 8:
        raise CheckpointError(f"{path}: is not a safetensors file: {size} bytes are too short")
    (length,) = struct.unpack("<Q", first)
    if beginning[8:9] != b"{":
        raise CheckpointError(f"{path}: is not a safetensors file: it does not begin with a header")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path}: broken header: it claims {length:,} bytes, more than the format's 100 MB")
    if 8 + length > size:
        raise CheckpointError(f"{path}: is truncated: its header alone claims {length:,} bytes, the file has {size:,}")
    file.seek(8)
    entries = parse_json(path, file.read(length))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: broken header: its metadata is not a table of strings")
    tensors = {name: parse_entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    check_coverage(path, tensors, 8 + length, size)
    return Header(path, tensors, metadata)


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """The header's JSON object. A name that appears twice is an error: one of the two would be lost."""

    def no_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            (twin, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise CheckpointError(f"{path}: broken header: the name '{shown(twin)}' appears twice")
        return entries

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=no_twins)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise CheckpointError(f"{path}: broken header: it is not JSON ({type(error).__name__})") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: broken header: it is not a JSON object")
    return entries


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    """One tensor's entry, with its size checked against its dtype and shape."""
    broken = f"{path}: broken header: tensor '{shown(name)}'"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{broken} has no description")
    dtype, shape, offsets = (entry.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{broken} has the unknown dtype '{shown(dtype, 40)}'")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or not all(is_count(n) for n in shape):
        raise CheckpointError(f"{broken} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_count(n) for n in offsets):
        raise CheckpointError(f"{broken} has no valid data offsets")
    begin, end = offsets
    if begin > end or (end - begin) * 8 != prod(shape) * DTYPE_BITS[dtype]:
        raise CheckpointError(
            f"{broken} is {dtype} {shape}, which does not fit the {end - begin:,} bytes it is said to have"
        )
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def check_coverage(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    """The tensors must cover the rest of the file exactly: no overlap, no hole, nothing cut off, nothing appended."""
    position = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.end > size:
            raise CheckpointError(
                f"{path}: is truncated: tensor '{shown(name)}' ends at byte {info.end:,}, the file at {size:,}; "
                "download it again"
            )
        if info.start != position:
            kind = "overlap" if info.start < position else "leave a hole"
            raise CheckpointError(f"{path}: broken header: the data offsets {kind} at tensor '{shown(name)}'")
        position = info.end
    if position != size:
        raise CheckpointError(
            f"{path}: has {size - position:,} bytes after its last tensor: it is not what its header says"
        )


# ---- several files that together are one ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Files:
    """One file, or shards that together are one file: every tensor's header entry and where it is."""

    path: Path  # what to call it in messages
    tensors: dict[str, TensorInfo]
    location: dict[str, Path]
    metadata: dict[str, str]


def open_files(paths: list[Path], name: Path) -> Files:
    """Read the headers of one file or of all shards."""
    tensors: dict[str, TensorInfo] = {}
    location: dict[str, Path] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        header = read_header(path)
        for twin in header.tensors.keys() & tensors.keys():
            raise CheckpointError(f"{name}: the tensor '{shown(twin)}' is in two shards")
        own = split_thirds(header.tensors)
        tensors |= own
        location |= dict.fromkeys(own, path)
        metadata |= header.metadata
    return Files(name, tensors, location, metadata)


Part = TypeVar("Part")
FUSED = ("attn.in_proj_weight", "attn.in_proj_bias")  # OpenCLIP's queries, keys and values: one tensor, three layers
THIRDS = ("/q", "/k", "/v")  # behind the tensor's name: these rows of it
# OpenCLIP's in SDXL's base and refiner, a transposed matrix: "/t" behind its name
TURNED = tuple(f"conditioner.embedders.{number}.model.text_projection" for number in (1, 0))


def split_thirds(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors, the fused ones as three: their rows lie behind each other, so each third is a tensor too.

    And the transposed one in the shape that a layer has.
    """
    split: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name.endswith(FUSED) and info.shape and info.shape[0] % 3 == 0:
            rows, size = info.shape[0] // 3, (info.end - info.start) // 3
            for number, third in enumerate(THIRDS):
                start = info.start + number * size
                split[name + third] = TensorInfo(info.dtype, (rows, *info.shape[1:]), start, start + size)
        elif name.endswith(TURNED):
            split[f"{name}/t"] = TensorInfo(info.dtype, info.shape[::-1], info.start, info.end)
        else:
            split[name] = info
    return split


def is_turned(name: str) -> bool:
    """Whether the tensor of this name is transposed in the file."""
    return name.endswith("/t") and name[:-2].endswith(TURNED)


def fused_name(name: str) -> tuple[str, int | None]:
    """A tensor's name in the file, and which third of it is meant: None for all of it."""
    whole, third = name[:-2], name[-2:]
    if is_turned(name):
        return whole, None
    return (whole, THIRDS.index(third)) if third in THIRDS and whole.endswith(FUSED) else (name, None)


def by_whole(parts: Mapping[str, Part]) -> dict[str, list[Part]]:
    """Things by tensor -> those of each tensor of a file: one, or its thirds in their order."""
    whole: dict[str, list[str]] = {}
    for name in parts:
        whole.setdefault(fused_name(name)[0], []).append(name)
    return {one: [parts[name] for name in sorted(names, key=fused_name)] for one, names in whole.items()}


def shard_paths(index: Path) -> list[Path]:
    """The shards that an index names: files in its own folder, nowhere else."""
    table = read_json_object(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names the shard '{shown(name)}', which is outside its folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names the shard '{shown(name)}', which is missing")
    return [index.parent / name for name in names]
