"""A checkpoint as a read-only mapping: every weight under any of its three names, nothing read until it is asked for.

    weights = minisd.checkpoint.open("v1-5-pruned-emaonly.safetensors")
    q = weights["unet.down.4.attention.cross_attn.q.weight"]
    q is weights["unet/down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q.weight"]
    q is weights["model.diffusion_model.input_blocks.5.1.transformer_blocks.0.attn2.to_q.weight"]
    q.shape, q.dtype    # from the header
    q[:80]              # reads these rows: the first head's
    q.read()            # reads all of it

Files are memory-mapped, and never written to.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minisd.checkpoint.keymap import COMPVIS_PREFIX
from minisd.checkpoint.survey import Part, find
from minisd.checkpoint.values import Values


@dataclass(frozen=True)
class Weight:
    """One weight of a checkpoint, not yet read. 8-bit floats are read as float32, times their scale."""

    name: str  # minisd's: component.place.layer.weight
    diffusers: str
    compvis: str
    values: Values = field(repr=False)

    @property
    def _inner(self) -> str:
        return self.name.partition(".")[2]

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.values.shape(self._inner))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype(self._inner)

    def __getitem__(self, index: Any) -> Tensor:
        """The values at `index`, as torch indexes: of the file, only their pages are read."""
        return self.values[self._inner][index].clone()

    def read(self) -> Tensor:
        """All values, in the model's shape."""
        return self[...]


class Weights(Mapping[str, Weight]):
    """The weights of a checkpoint. Iterating gives minisd's names, each with its component: "vae.decoder...".

    Looking up takes, besides, diffusers' names behind their folder's (`unet/down_blocks...`, or with a dot), CompVis'
    with their prefix (`first_stage_model...`), and each of the three without what stands in front, where just one
    weight is called so.
    """

    def __init__(self, found: Iterable[Part]) -> None:
        self._weights: dict[str, Weight] = {}
        self._names: dict[str, list[str]] = {}  # any name -> minisd's
        for one in found:
            values = Values(one.files, one.match)
            for key in one.keys:
                if key.minisd in values:
                    name, diffusers = f"{one.component}.{key.minisd}", f"{one.component}/{key.diffusers}"
                    compvis = COMPVIS_PREFIX[one.component] + key.compvis
                    self._weights[name] = Weight(name, diffusers, compvis, values)
                    dotted = f"{one.component}.{key.diffusers}"
                    for alias in {diffusers, dotted, compvis, key.minisd, key.diffusers, key.compvis}:
                        self._names.setdefault(alias, []).append(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, name: str) -> Weight:
        if name in self._weights:
            return self._weights[name]
        meant = self._names.get(name, [])
        if len(meant) != 1:
            raise KeyError(f"{name}: may be {' or '.join(meant)}" if meant else f"{name}: no weight is called so")
        return self._weights[meant[0]]


def open(source: str | os.PathLike[str], *, weights: str = "auto") -> Weights:
    """Open the checkpoint at `source` (anything that `StableDiffusion.load` takes, or a part of it) for looking.

    `weights`: "auto", "ema" or "raw", where a file has two UNets; auto takes the raw one. Raises FileNotFoundError for
    a path that is not there, CheckpointError for what holds no part of Stable Diffusion 1.x. A weight that is missing
    or has another shape than its place wants is not in the mapping.
    """
    return Weights(find(source, weights).values())
