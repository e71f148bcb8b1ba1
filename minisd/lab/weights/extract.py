"""What fine-tuning did to a model, as a LoRA: the best low-rank approximation of every layer's difference.

    extract("base.safetensors", "tuned.safetensors", rank=16, target="tuned-lora.safetensors")

For each layer the difference B - A is factored by a singular value decomposition, and the `rank` largest values stay
(Eckart & Young 1936: no other matrices of this rank come closer). One pair of weights is in memory at a time.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from minisd.adapters.targets import Target, layers
from minisd.adapters.writing import checked_path, write_lora
from minisd.checkpoint.hub import sha256
from minisd.checkpoint.naming import TITLES
from minisd.checkpoint.save import modelspec
from minisd.checkpoint.survey import Part, find, survey
from minisd.checkpoint.values import Values
from minisd.config import SD15
from minisd.files import CheckpointError

Source = str | os.PathLike[str]

# Halko et al. 2011, arXiv:0909.4061: with these the energy kept agrees with that of the full decomposition to 1e-6 of
# it, at 1/50 of the time (1280 x 1280: 0.02 s for 1 s).
SPARE, ROUNDS = 8, 4
SEED = 0
LARGEST = 1e9  # of differences, as a norm: the factors have its root, which must fit into float16
TARGETS = ("unet", "text_encoder")


@dataclass
class Kept:
    """How much of a component's difference the LoRA holds. Squares of Euclidean norms."""

    layers: int = 0
    difference: float = 0.0
    kept: float = 0.0
    outside: int = 0  # weights that changed and are no layer: norms, biases, embeddings

    @property
    def energy(self) -> float:
        """The share of the layers' squared difference, 0 to 1."""
        return self.kept / self.difference if self.difference else 1.0

    @property
    def error(self) -> float:
        """What is missing, relative to the difference: |difference - LoRA| / |difference|."""
        return math.sqrt(max(0.0, 1.0 - self.energy))


@dataclass
class Extract:
    """A LoRA that was written, and how good it is."""

    path: Path
    rank: int
    components: dict[str, Kept] = field(default_factory=dict)


def extract(
    a: Source,
    b: Source,
    *,
    rank: int,
    target: Source,
    dtype: torch.dtype = torch.float16,
    advance: Callable[[int], object] = lambda _: None,
) -> Extract:
    """Write the LoRA of at most `rank` that makes the model `a` most like the model `b`; returns what it holds.

    The metadata tell the sources, their sha256, the rank and the relative error. `advance` is told after each layer.
    Raises CheckpointError for what is no model, for models of different shapes and for two that do not differ in any
    layer; ValueError for an impossible rank or name.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: must be at least 1")
    path = checked_path(target)
    pairs = common(a, b)
    done, factors = Extract(path, rank), {}
    for component, (one, other) in pairs.items():
        kept = done.components[component] = Kept()
        for layer, down, up in changed_layers(component, one, other, rank, kept, advance):
            factors[layer] = down.to(dtype), up.to(dtype)
    if not factors:
        raise CheckpointError(f"{a} and {b} do not differ in any layer of UNet and text encoder: there is no LoRA")
    write_lora(path, factors, dtype=dtype, metadata=told(done, a, b, pairs))
    return done


def common(a: Source, b: Source) -> dict[str, tuple[Part, Part]]:
    """The UNet and the text encoder of both, as far as both have them; they must be complete and of one shape."""
    one, other = find(a), find(b)
    pairs = {name: (one[name], other[name]) for name in TARGETS if name in one and name in other}
    if not pairs:
        raise CheckpointError(f"{a} and {b} have neither a UNet nor a text encoder in common")
    for name, (left, right) in pairs.items():
        for path, side in ((a, left), (b, right)):
            side.problems.raise_for(str(path))
        for key in left.keys:
            theirs = right.match.sources.get(key.minisd, (None, ()))[1]
            if theirs != key.shape:
                words = added_tokens(key.minisd, key.shape, theirs)
                raise CheckpointError(f"{a} and {b}: the {TITLES[name]}s differ in shape at {key.minisd}{words}")
    return pairs


def added_tokens(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> str:
    """Tables of tokens that differ only in length: what that means, and the way out. Of anything else: nothing."""
    if name != "token_embedding.weight" or a[1:] != b[1:]:
        return ""
    longer = "A" if a > b else "B"
    return f": {longer} has {abs(a[0] - b[0])} added tokens more, which no LoRA holds; give one saved without them"


def changed_layers(
    component: str, one: Part, other: Part, rank: int, kept: Kept, advance: Callable[[int], object]
) -> Iterator[tuple[Target, Tensor, Tensor]]:
    """Each layer that differs, with its factors; what they hold is added up in `kept`."""
    a, b = Values(one.files, one.match), Values(other.files, other.match)
    of_weight = {layer.weight[1]: layer for layer in layers(component, one.keys)}
    for name in a:
        layer, difference = of_weight.get(name), b[name].to(torch.float32, copy=True).sub_(a[name])
        advance(1)
        if not difference.any():
            continue
        size = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
        if not size < LARGEST:
            raise CheckpointError(too_large(name, (a, one), (b, other)))
        if layer is None:
            kept.outside += 1
            continue
        down, up, energy = factored(difference, rank)
        kept.layers += 1
        kept.difference += size**2
        kept.kept += energy
        yield layer, down, up


def too_large(name: str, *sides: tuple[Values, Part]) -> str:
    """Which file makes this difference endless, or NaN."""
    for values, found in sides:
        if not values[name].isfinite().all():
            return f"{found.files.location[values.match.sources[name][0]]}: {name} holds NaN or infinite numbers"
    files = " and ".join(str(found.files.path) for _, found in sides)
    return f"{files}: {name} differs by more than a LoRA can hold (a norm of {LARGEST:,.0f})"


def factored(difference: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A difference (out, in, ...) -> down (r, in, ...), up (out, r, ...) and the energy that they hold.

    The singular values go half into either factor: both stay in the range of float16.
    """
    matrix = difference.flatten(1)
    rank = min(rank, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # the projection is random, the result need not be
        left, values, right = torch.svd_lowrank(matrix, q=min(rank + SPARE, *matrix.shape), niter=ROUNDS)
    root = values[:rank].sqrt()
    down, up = root[:, None] * right[:, :rank].T, left[:, :rank] * root
    ones = [1] * (difference.ndim - 2)
    energy = float(values[:rank].double().square().sum())
    return down.reshape(rank, *difference.shape[1:]), up.reshape(len(up), rank, *ones), energy


def told(done: Extract, a: Source, b: Source, pairs: Mapping[str, tuple[Part, Part]]) -> dict[str, str]:
    """The metadata."""
    sources = {
        side: {"name": Path(path).name, "sha256": sums(pair[index] for pair in pairs.values())}
        for index, (side, path) in enumerate((("a", a), ("b", b)))
    }
    unet = pairs["unet"][1].config if "unet" in pairs else SD15.unet
    errors = {name: round(kept.error, 6) for name, kept in done.components.items()}
    facts = {"sources": sources, "rank": done.rank, "relative_error": errors}
    return {
        **modelspec(done.path.stem, survey(b).schedule.prediction, unet, SD15.vae.downsampling, "/lora"),
        "minisd.extract": json.dumps(facts),
        "ss_network_dim": str(done.rank),
        "ss_network_alpha": str(done.rank),
    }


def sums(several: Iterable[Part]) -> dict[str, str]:
    """The sha256 of every file that components are in."""
    paths = dict.fromkeys(path for found in several for path in found.files.location.values())
    return {f"{path.parent.name}/{path.name}": sha256(path) for path in paths}


def lines(done: Extract) -> Iterable[str]:
    """What was kept, for a person."""
    for component, kept in done.components.items():
        title = TITLES[component]
        if not kept.layers:
            yield f"{title}: no layer changed"
            continue
        yield f"{title}: {kept.layers} layers, {kept.energy:.2%} of the squared difference kept, error {kept.error:.2g}"
        if kept.outside:
            yield f"{title}: {kept.outside} changed norms, biases or embeddings are left out: no LoRA holds them"
