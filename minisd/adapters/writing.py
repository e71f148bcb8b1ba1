"""Adapters -> files that every program reads: LoRAs in kohya's dialect, embeddings under their word's name."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minisd.adapters.targets import Target, names
from minisd.checkpoint.save import into_place, write_tensors


def write_lora(
    path: str | os.PathLike[str],
    factors: Mapping[Target, tuple[Tensor, Tensor]],
    *,
    dtype: torch.dtype = torch.float16,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write down (r, in, ...) and up (out, r, ...) of every layer; the change is up times down, alpha being r.

    Returns the path. Raises ValueError for a name that does not end in .safetensors.
    """
    target = checked_path(path)
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in (*factors.items(), *silent(factors)):
        name = next(names(layer))
        tensors[f"{name}.lora_down.weight"] = down.detach().cpu().to(dtype).contiguous()
        tensors[f"{name}.lora_up.weight"] = up.detach().cpu().to(dtype).contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(len(down)), dtype=dtype)
    said = {"ss_network_module": "networks.lora", "modelspec.architecture": "stable-diffusion-v1/lora"}
    into_place(target, lambda file: write_tensors(file, tensors, said | dict(metadata or {})))
    return target


def silent(factors: Mapping[Target, tuple[Tensor, Tensor]]) -> Iterator[tuple[Target, tuple[Tensor, Tensor]]]:
    """Zeros for each out_proj that a text encoder's attention block lacks: they change nothing.

    diffusers 0.42 looks for the layers of a block by its out_proj, and would drop the block's queries without it.
    """
    there = {layer.diffusers for layer in factors if layer.component == "text_encoder"}
    for layer, (down, up) in factors.items():
        block, _, last = layer.diffusers.rpartition(".")
        missing = f"{block}.out_proj"
        if layer.component == "text_encoder" and last in ("q_proj", "k_proj", "v_proj") and missing not in there:
            there.add(missing)
            yield replace(layer, diffusers=missing), (torch.zeros_like(down), torch.zeros_like(up))


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path, if an adapter can be written there. Raises ValueError otherwise."""
    target = Path(os.path.expanduser(path))
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: the name must end in .safetensors")
    if target.is_dir():
        raise ValueError(f"{target}: is a folder; name a file in it")
    return target


def write_embedding(path: str | os.PathLike[str], word: str, vectors: Tensor) -> Path:
    """Write a textual inversion (n, width) under the word's name, as diffusers does; returns the path."""
    target = checked_path(path)
    into_place(target, lambda file: write_tensors(file, {word: vectors.detach().cpu().contiguous()}, {}))
    return target
