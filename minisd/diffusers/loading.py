"""`from_pretrained`: its arguments in diffusers' names -> files, through `minisd.checkpoint`."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from minisd.checkpoint.header import Files
from minisd.checkpoint.hub import ALL_STEMS, EMBEDDED, SD15_REPOSITORY, resolve, why_not_fetched
from minisd.checkpoint.load import open_alone
from minisd.checkpoint.survey import Part
from minisd.diffusers.refusing import NotCoveredError, shortened
from minisd.files import CheckpointError, read_json_object

# Arguments of every from_pretrained that change nothing here, and the values at which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "revision": (None, "main", "fp16"),
    "use_safetensors": (None, True),
    "low_cpu_mem_usage": (None, True, False),
    "local_files_only": (None, False),
    "force_download": (None, False),
    "cache_dir": (None,),
    "token": (None, True, False),
    "use_auth_token": (None, True, False),
    "device_map": (None,),
}
Source = str | os.PathLike[str]


def chosen_dtype(call: str, dtype: Any, torch_dtype: Any, default: torch.dtype | None) -> torch.dtype | None:
    """The dtype asked for under either of its two names; None, the file's, for "auto". Raises NotCoveredError."""
    asked = torch_dtype if dtype is None else dtype
    if isinstance(asked, str) and asked == "auto":
        return None
    if asked is not None and not (isinstance(asked, torch.dtype) and asked.is_floating_point):
        raise NotCoveredError(
            f"{call}: torch_dtype={shortened(asked)} is not covered by minisd.diffusers, which takes a floating-point "
            'torch.dtype, or "auto"'
        )
    return default if asked is None else asked


def chosen_dtypes(call: str, dtype: Any, torch_dtype: Any) -> dict[str, torch.dtype | None]:
    """The dtype of each network: one for all, float32 unless given, or a dict by part with a "default"."""
    asked = torch_dtype if dtype is None else dtype
    by_part = asked if isinstance(asked, dict) else {"default": asked}
    usual = by_part.get("default")
    return {name: chosen_dtype(call, by_part.get(name, usual), None, torch.float32) for name in ALL_STEMS}


def check_variant(call: str, variant: str | None) -> None:
    if variant not in (None, "fp16", "non_ema"):
        raise NotCoveredError(
            f"{call}: variant={variant!r} is not covered by minisd.diffusers, which takes 'fp16' and 'non_ema'"
        )


def check_is_variant(files: Files, variant: str | None) -> None:
    """minisd takes the nearest file that there is; whoever names a variant means that one."""
    names = {files.path.name, *(path.name for path in files.location.values())}
    if variant is not None and not any(f".{variant}." in name or f".{variant}-" in name for name in names):
        raise CheckpointError(f"{files.path.parent}: has no {variant} variant")


def folder_of_network(source: Source, component: str, subfolder: str | None, variant: str | None) -> Path:
    """The folder of one network, fetched if it is on the hub. Raises CheckpointError or FileNotFoundError."""
    folder = resolve(source, component=component, **files_of(variant)) / (subfolder or "")
    read_json_object(folder / "config.json")  # diffusers wants one
    return folder


def open_part(source: Source, component: str, subfolder: str | None, variant: str | None) -> Part:
    """One network's folder, understood but not yet read. Raises CheckpointError or FileNotFoundError."""
    folder, notes = folder_of_network(source, component, subfolder, variant), list[str]()
    return note_part(open_alone(folder, component, notes=notes, **files_of(variant)), variant, notes)


def files_of(variant: str | None) -> dict[str, Any]:
    """Which files to take, in the words of `hub.resolve` and `load.open_alone`."""
    return {"half": variant == "fp16", "weights": "raw" if variant == "non_ema" else "auto"}


def note_part(part: Part, variant: str | None, notes: Iterable[str] | None = None) -> Part:
    """The part, with a warning for each of its notes, if it is of the variant asked for."""
    for note in part.notes if notes is None else notes:
        warnings.warn(note, stacklevel=5)
    check_is_variant(part.files, variant)
    return part


def folder_of_texts(source: Source, subfolder: str | None) -> Path:
    """The folder of a scheduler or a tokenizer, fetched without the weights beside it if it is on the hub."""
    name = SD15_REPOSITORY if source == "sd15" else os.fspath(source)
    if name in EMBEDDED or os.path.lexists(os.path.expanduser(name)) or name.count("/") != 1:
        return resolve(name) / (subfolder or "")
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/*"] if subfolder else ["*.json", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns)) / (subfolder or "")
    except Exception as error:  # the hub's, the HTTP library's, the disk's
        raise CheckpointError(f"{name}: {why_not_fetched(error)}") from None
