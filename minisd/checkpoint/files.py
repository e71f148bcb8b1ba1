"""One safetensors file, or several that together are one: shards, or a variant in a folder of diffusers' layout.

Only headers are read here. This file needs the standard library only. Next: `layouts.py`.
"""

from dataclasses import dataclass
from pathlib import Path

from minisd.checkpoint.errors import CheckpointError
from minisd.checkpoint.header import WAY_OUT, TensorInfo, read_header
from minisd.checkpoint.hub import STEMS, index_name, single_name, variant_of
from minisd.checkpoint.textfiles import read_json_object


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
            raise CheckpointError(f"{name}: the tensor {twin!r} is in two shards")
        tensors |= header.tensors
        location |= dict.fromkeys(header.tensors, path)
        metadata |= header.metadata
    return Files(name, tensors, location, metadata)


def shard_paths(index: Path) -> list[Path]:
    """The shards that an index names: files in its own folder, nowhere else."""
    table = read_json_object(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names the shard {name!r}, which is outside its folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: names the shard {name!r}, which is missing")
    return [index.parent / name for name in names]


def open_component_folder(folder: Path, component: str, *, half: bool, weights: str) -> Files:
    """The weights in one folder of diffusers' layout, whichever variant and however many shards."""
    names = sorted(entry.name for entry in folder.iterdir())
    for stem in dict.fromkeys((STEMS[component], *STEMS.values())):
        variant = variant_of(names, stem, half=half, weights=weights)
        if variant is None:
            continue
        single = folder / single_name(stem, variant)
        if single.name in names:
            return open_files([single], single)
        index = folder / index_name(stem, variant)
        return open_files(shard_paths(index), index)
    if any(name.endswith((".bin", ".ckpt", ".pt")) for name in names):
        raise CheckpointError(f"{folder}: holds pickles only, which may run code when opened: {WAY_OUT}")
    raise CheckpointError(f"{folder}: has no {STEMS[component]}.safetensors")
