"""Which components of Stable Diffusion are in a file or folder, whole or not: found out from headers alone.

Loading (`reading.py`) is strict; this is for looking: `minisd inspect`, and `minisd.checkpoint.open`. This file needs
the standard library only.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisd.checkpoint import configs
from minisd.checkpoint.errors import CheckpointError
from minisd.checkpoint.files import Files, open_component_folder, open_files, shard_paths
from minisd.checkpoint.hub import resolve
from minisd.checkpoint.keymap import COMPONENTS, KEYS, Key
from minisd.checkpoint.naming import INFER, TITLES, Match, Naming, Problems, match, namings, stranger, way_out
from minisd.checkpoint.textfiles import read_json_object
from minisd.config import SD15


@dataclass(frozen=True)
class Found:
    """One component under one set of names. A UNet that is there twice, raw and averaged (EMA), is found twice."""

    component: str
    averaged: bool
    config: Any
    keys: list[Key]
    match: Match
    problems: Problems  # what is missing or misshapen
    files: Files
    flaw: str | None  # why its configuration cannot be used


def find_files(path: Path) -> dict[str, tuple[Files, Path | None]]:
    """Every set of weight files at `path`, with the config.json beside it: a file, the shards of an index, a folder of
    one component, or a model's folder, which has one set a component. "" stands for a set without a folder of its own.
    """
    if path.suffix == ".json" and not path.is_dir():
        return {"": (open_files(shard_paths(path), path), None)}
    if not path.is_dir():
        return {"": (open_files([path], path), None)}
    folders = {name: path / name for name in COMPONENTS if (path / name).is_dir()} or {"": path}
    return {
        name: (open_component_folder(folder, name or "unet", half=False, weights="auto"), folder / "config.json")
        for name, folder in folders.items()
    }


def find(source: str | os.PathLike[str], weights: str = "auto") -> dict[str, Found]:
    """The components at `source`, the UNet's raw or averaged weights as `weights` says: "auto", "ema" or "raw".

    Raises FileNotFoundError for a path that is not there, CheckpointError for what holds no part of Stable Diffusion
    1.x, ValueError for other `weights`.
    """
    if weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights={weights!r}: must be 'auto', 'ema' or 'raw'")
    path = resolve(source, weights=weights)
    found: dict[str, dict[bool, Found]] = {}
    for files, config in find_files(path).values():
        if other := stranger(files.tensors):
            raise CheckpointError(f"{files.path}: is {other}; {way_out(other)}")
        for one in find_components(files, config):
            found.setdefault(one.component, {})[one.averaged] = one
    if not found:
        raise CheckpointError(f"{path}: holds no part of Stable Diffusion 1.x")
    unets = found.get("unet", {})
    averaged = weights == "ema" or (weights == "auto" and False not in unets)
    if unets and averaged not in unets:
        raise CheckpointError(f"{path}: has no {weights} UNet weights")
    return {name: sets[name == "unet" and averaged] for name, sets in found.items()}


def find_components(files: Files, config: Path | None) -> Iterator[Found]:
    """Each component under each set of names that it has in the files."""
    for component in COMPONENTS:
        for kind, naming in namings(component, files.tensors).items():
            (numbers, flaw), problems = configuration(component, naming, files, config), Problems()
            keys = list(KEYS[component](numbers))
            found = match(keys, files.tensors, naming, problems)
            yield Found(component, kind == "ema", numbers, keys, found, problems, files, flaw)


def configuration(component: str, naming: Naming, files: Files, path: Path | None) -> tuple[Any, str | None]:
    """The configuration, and why the stated one would not do.

    From config.json, else from the metadata, else from the shapes, else SD 1.5's: in comparison with that it shows what
    is wrong.
    """
    flaw = None
    where, stated = stated_configuration(component, files, path)
    if stated is not None:
        try:
            return configs.READERS[component](stated, where, []), None
        except CheckpointError as error:
            flaw = str(error)
        except (TypeError, AttributeError):
            flaw = f"{where}: holds a broken configuration of the {TITLES[component]}"
    try:
        return INFER[component](files.tensors, naming), flaw
    except CheckpointError:
        return getattr(SD15, component), flaw


def stated_configuration(component: str, files: Files, path: Path | None) -> tuple[str, Any]:
    """Where a configuration stands, and what stands there; None where none is stated."""
    if path is not None and path.is_file():
        return str(path), read_json_object(path)
    if "minisd.config" not in files.metadata:
        return "", None
    stored = json_or_none(files.metadata["minisd.config"])
    return f"{files.path} (metadata minisd.config)", "" if stored is None else stored.get(component)


def json_or_none(text: str | None) -> dict[str, Any] | None:
    try:
        value = json.loads(text or "null")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
