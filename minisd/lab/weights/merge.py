"""Several checkpoints into one: weighted sums, differences, spherical interpolation, by block; components, LoRAs.

    merge("a.safetensors", "b.safetensors", "ab.safetensors", weight=0.3)        # 70 % of A, 30 % of B
    merge("a.safetensors", "b.safetensors", "new.safetensors", minus="base.safetensors", weight=1.0)
    merge("a.safetensors", None, "other-vae.safetensors", take={"vae": "vae-ft-mse.safetensors"})

The result is A in everything but the values: A's dtypes, A's schedule buffers and other integers, A's tokenizer. It
streams as `convert` does: a few rows of each model are in memory at a time. How it was made, and of which files, stands
in its metadata.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minisd.adapters.lora import Change, LoRA, baked_together, open_lora
from minisd.checkpoint.header import Files
from minisd.checkpoint.hub import sha256
from minisd.checkpoint.keymap import FAMILY, KEYS, Key
from minisd.checkpoint.load import Checkpoint
from minisd.checkpoint.naming import TITLES, ignorable
from minisd.checkpoint.save import into_place
from minisd.checkpoint.survey import AVERAGED, Part, find, survey
from minisd.checkpoint.values import Values
from minisd.files import CheckpointError, shown
from minisd.lab.weights.convert import Advance, Conversion, Job, check_apart, plan, run
from minisd.lab.weights.streaming import NAMES, Entry, Made

Source = str | os.PathLike[str]
Rows = Callable[[], Iterator[tuple[slice, Tensor]]]  # a weight, some rows at a time: which ones, and their values

RECIPE = "minisd.merge"  # where the recipe stands in the metadata
PARALLEL = 0.9995  # cosine from which an arc and its chord are the same in float32

# What of A's leftovers is still true after a merge. Its averaged weights, say, are not.
STILL_TRUE = ("schedule buffers", "position ids", "sampler settings")


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What is asked for; see `merge`. Raises ValueError for settings that make no sense."""

    a: Source
    b: Source | None
    target: Source
    weight: float = 0.5
    minus: Source | None = None
    slerp: bool = False
    blocks: Sequence[float] | None = None
    take: Mapping[str, Source] = field(default_factory=dict)
    loras: Sequence[tuple[Source, float]] = ()
    layout: str | None = None
    dtype: torch.dtype | None = None
    weights: str = "auto"

    def __post_init__(self) -> None:
        if self.b is None and not self.take and not self.loras:
            raise ValueError("nothing to do: give a second model, a component to take, or a LoRA")
        if self.b is None and (self.minus is not None or self.slerp or self.blocks is not None):
            raise ValueError("minus, slerp and blocks say how a second model comes in: give one")
        if self.minus is not None and self.slerp:
            raise ValueError("slerp and minus exclude each other: an arc has two ends")
        for number in (self.weight, *(self.blocks or ()), *(scale for _, scale in self.loras)):
            if not math.isfinite(number):
                raise ValueError(f"{number}: a weight or scale must be a finite number")
        for name in self.take:
            if name not in FAMILY:
                raise ValueError(f"take={name!r}: must be one of {', '.join(FAMILY)}")

    @property
    def others(self) -> list[Source]:
        """Every source but A."""
        paths = (self.b, self.minus, *self.take.values(), *(path for path, _ in self.loras))
        return [path for path in paths if path is not None]


@dataclass(frozen=True)
class Mixture:
    """How B, and C, come into A. `weight` is w where `blocks` does not say another."""

    b: Mapping[str, Part]
    c: Mapping[str, Part] | None
    weight: float
    blocks: tuple[float, ...] | None
    slerp: bool


def merge(
    a: Source,
    b: Source | None,
    target: Source,
    *,
    weight: float = 0.5,
    minus: Source | None = None,
    slerp: bool = False,
    blocks: Sequence[float] | None = None,
    take: Mapping[str, Source] | None = None,
    loras: Sequence[tuple[Source, float]] = (),
    layout: str | None = None,
    dtype: torch.dtype | None = None,
    weights: str = "auto",
    advance: Advance = lambda _: None,
) -> Path:
    """Mix A with B and write the result to `target`; returns `target`.

    (1 - w) A + w B; with `minus` A + w (B - C); with `slerp` along the arc from A to B (Shoemake 1985), tensor by
    tensor. `weight` is w. `blocks` are 25 numbers, w for each block of the UNet from the way down (IN00 to IN11) over
    the middle (M00) to the way up (OUT00 to OUT11), as people exchange them, or 26 with w for all the rest in front.
    `take` swaps whole components, {"vae": path}. `loras` are baked in at the end: pairs of a path and a scale.
    `layout`, `dtype`, `weights`: as in `convert`. Computes in float32, in float64 where A is.

    Raises CheckpointError for what cannot be read or does not fit together, ValueError for impossible settings.
    """
    wanted = Merge(
        a=a, b=b, target=target, weight=weight, minus=minus, slerp=slerp, blocks=blocks, take=take or {}, loras=loras,
        layout=layout, dtype=dtype, weights=weights,
    )  # fmt: skip
    job = prepare(wanted)
    into_place(job.target, lambda place: run(job, place, advance))
    return job.target


def prepare(wanted: Merge) -> Job:
    """Read the headers, and the sources' sums, and settle everything: nothing is written yet."""
    check_apart(Path(os.path.expanduser(wanted.target)), wanted.others)
    find(wanted.a, wanted.weights)  # says what A is, if it is no model
    conversion = Conversion(
        source=wanted.a, target=wanted.target, layout=wanted.layout, dtype=wanted.dtype, weights=wanted.weights,
        take=wanted.take,
    )  # fmt: skip
    job = plan(conversion)
    assert job.checkpoint is not None  # it is a whole model
    mixture = mixture_of(wanted, job.checkpoint)
    adapters = [(open_lora(path, job.checkpoint.config), scale) for path, scale in wanted.loras]
    for lora in (lora for lora, _ in adapters if lora.words):
        raise CheckpointError(f"{lora.path}: has embeddings in it ({', '.join(map(shown, lora.words))}); merge has no "
                              "place for them: load the LoRA in Python, and save the model")  # fmt: skip
    entries = {
        component: list(changed(job, component, None if component in wanted.take else mixture, adapters, wanted.dtype))
        for component in job.entries
    }
    leftovers = [one for one in job.leftovers if ignorable(one.name) in STILL_TRUE]
    return replace(job, entries=entries, leftovers=leftovers, recipe=recipe_of(wanted, job, mixture))


def mixture_of(wanted: Merge, checkpoint: Checkpoint) -> Mixture | None:
    """The models that come into A. A note says so where their UNets do not predict the same."""
    if wanted.b is None:
        return None
    predicted = checkpoint.survey.schedule.prediction
    for letter, source in (("B", wanted.b), ("C", wanted.minus)):
        found = survey(source, weights=wanted.weights) if source is not None else None
        other = found.schedule.prediction if found and found.parts.keys() & {"unet", AVERAGED} else predicted
        if other != predicted:
            checkpoint.notes.append(
                f"A's UNet predicts {predicted}, {letter}'s {other}: their mixture does neither well"
            )
    subtracted = find(wanted.minus, wanted.weights) if wanted.minus is not None else None
    blocks = tuple(wanted.blocks) if wanted.blocks else None
    return Mixture(find(wanted.b, wanted.weights), subtracted, wanted.weight, blocks, wanted.slerp)


def recipe_of(wanted: Merge, job: Job, mixture: Mixture | None) -> dict[str, str]:
    """How the result was made, as metadata."""
    blocks = wanted.blocks and list(wanted.blocks)
    how = {"weight": wanted.weight, "blocks": blocks, "slerp": wanted.slerp} if mixture else {}
    loras = [{"name": Path(path).name, "scale": scale} for path, scale in wanted.loras]
    recipe = {**how, "weights": wanted.weights, "loras": loras}
    hashes = hashes_of(job, mixture, wanted.take, [path for path, _ in wanted.loras])
    return {RECIPE: json.dumps({"recipe": recipe, "sources": hashes})}


# ---- one weight ------------------------------------------------------------------------------------------


def changed(
    job: Job,
    component: str,
    mixture: Mixture | None,
    loras: Sequence[tuple[LoRA, float]],
    dtype: torch.dtype | None,
) -> Iterator[Entry]:
    """A component's entries; those that the merge changes are computed."""
    part = job.components[component]
    keys = list(KEYS[component](part.config))
    a = Values(part.files, part.match)
    blend = blender(component, a, keys, mixture) if mixture else None
    for key, entry in zip(keys, job.entries[component], strict=True):
        name = key.minisd
        rows: Rows | None = blend(key) if blend else None
        changes = [(lora.changes[component, name], scale) for lora, scale in loras if (component, name) in lora.changes]
        if changes:
            rows = partial(baked, rows or partial(widened, a, name), changes)
        yield entry if rows is None else computed(entry, rows, dtype or a.dtype(name))


def computed(entry: Entry, rows: Rows, dtype: torch.dtype) -> Entry:
    """An entry with other values."""
    return replace(entry, dtype=NAMES[dtype], values=Made(lambda: (values.to(dtype) for _, values in rows())))


def widened(values: Values, name: str) -> Iterator[tuple[slice, Tensor]]:
    """A weight's rows in the dtype of the arithmetic."""
    for rows, piece in values.pieces(name):
        yield rows, piece.to(torch.promote_types(piece.dtype, torch.float32))


def blender(component: str, a: Values, keys: Sequence[Key], mixture: Mixture) -> Callable[[Key], Rows | None]:
    """What gives for each key its mixed rows, or None where A stays as it is."""
    others = []
    for letter, found in (("B", mixture.b), ("C", mixture.c)):
        if found is None:
            continue
        if component not in found:
            if letter == "B":
                return lambda key: None  # B is not a whole model: of A's other components nothing changes
            raise CheckpointError(f"C has no {TITLES[component]}, but A and B have one")
        others.append(fitting(found[component], a, letter))
    check_difference(others)
    shares = shares_of(component, keys, mixture)

    def blend(key: Key) -> Rows | None:
        return partial(mixed, a, others, key.minisd, shares[key.minisd], mixture.slerp) if shares[key.minisd] else None

    return blend


def fitting(found: Part, a: Values, letter: str) -> Values:
    """The component's values. Raises CheckpointError where they do not fit A's."""
    found.problems.raise_for(str(found.files.path))
    values = Values(found.files, found.match)
    for name in a:
        ours, theirs = a.shape(name), values.shape(name) if name in values else None
        if theirs == ours or (theirs and name == "conv_in.weight" and fewer_channels(theirs, ours)):
            continue
        hint = "; give the inpainting model as A" if name == "conv_in.weight" else ""
        raise CheckpointError(f"{found.files.path}: {letter}'s {name} is {theirs or 'missing'}, A's is {ours}{hint}")
    return values


def check_difference(others: Sequence[Values]) -> None:
    """Raise CheckpointError where B - C does not exist: one is an inpainting model, the other is not."""
    if len(others) < 2:
        return
    b, c = others
    for name in b:
        if b.shape(name) != c.shape(name):
            shapes = f"B's {name} is {b.shape(name)}, C's is {c.shape(name)} ({c.files.path})"
            raise CheckpointError(
                f"{b.files.path}: {shapes}: they have no difference; give two of the same channels in"
            )


def fewer_channels(theirs: tuple[int, ...], ours: tuple[int, ...]) -> bool:
    """Is it a model for text alone, where ours takes a mask and an image too?"""
    return theirs[1] < ours[1] and theirs[:1] + theirs[2:] == ours[:1] + ours[2:]


def mixed(a: Values, others: Sequence[Values], name: str, share: float, slerp: bool) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight of A, with `share` of B. B may have fewer channels in: the rest stays A's."""
    factors = arc(a, others[0], name, share) if slerp else None
    for (rows, x), *pieces in zip(widened(a, name), *(other.pieces(name) for other in others), strict=True):
        y, *rest = (piece.to(x.dtype) for _, piece in pieces)
        corner = x[tuple(map(slice, y.shape))]
        if factors is not None:
            corner.copy_(factors[0] * corner + factors[1] * y)
        elif rest:
            corner.copy_(corner + share * (y - rest[0]))
        else:
            corner.copy_(torch.lerp(corner, y, share))  # exact at both ends, and where both are the same
        yield rows, x


def arc(a: Values, b: Values, name: str, share: float) -> tuple[float, float]:
    """The factors of A and B at `share` of the arc between them: sin((1-t)W)/sin W and sin(tW)/sin W, W their angle."""
    xx = yy = xy = 0.0
    for (_, whole), (_, part) in zip(a.pieces(name), b.pieces(name), strict=True):
        x, y = whole[tuple(map(slice, part.shape))].double().flatten(), part.double().flatten()
        xx, yy, xy = xx + float(x @ x), yy + float(y @ y), xy + float(x @ y)
    cosine = xy / math.sqrt(xx * yy) if xx and yy else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - share, share
    angle = math.acos(cosine)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)


def baked(rows: Rows, changes: Sequence[tuple[Change, float]]) -> Iterator[tuple[slice, Tensor]]:
    """A weight with LoRAs worked in, whole: none that a LoRA changes is larger than 120 MB."""
    yield slice(None), baked_together(torch.cat([values for _, values in rows()]), changes)


# ---- blocks ----------------------------------------------------------------------------------------------


def shares_of(component: str, keys: Sequence[Key], mixture: Mixture) -> dict[str, float]:
    """B's share of each weight."""
    if mixture.blocks is None:
        return {key.minisd: mixture.weight for key in keys}
    if component != "unet":
        base = mixture.blocks[0] if len(mixture.blocks) % 2 == 0 else mixture.weight
        return {key.minisd: base for key in keys}
    places = {key.minisd: block_of(key) for key in keys}
    blocks = sorted(set(places.values()) - {OUT})
    shares = mixture.blocks[len(mixture.blocks) - len(blocks) :] if len(mixture.blocks) >= len(blocks) else ()
    if len(mixture.blocks) - len(blocks) not in (0, 1):
        raise ValueError(
            f"blocks has {len(mixture.blocks)} numbers: this UNet has {len(blocks)} blocks (one more number in front "
            "is for all the rest)"
        )
    share = dict(zip(blocks, shares, strict=True)) | {OUT: shares[-1]}
    return {name: share[place] for name, place in places.items()}


OUT = (3, 0)  # the end of the UNet


def block_of(key: Key) -> tuple[int, int]:
    """Which of CompVis' blocks a UNet weight is in, to be sorted by: the time embedding counts to the first (IN00);
    the end (OUT) to the last one.
    """
    part, number = key.compvis.split(".")[:2]
    places = {"time_embed": (0, 0), "middle_block": (1, 0), "out": OUT}
    return places[part] if part in places else ({"input_blocks": 0, "output_blocks": 2}[part], int(number))


# ---- where it came from ----------------------------------------------------------------------------------


def hashes_of(
    job: Job, mixture: Mixture | None, take: Collection[str], loras: Sequence[Source]
) -> dict[str, dict[str, str]]:
    """Of everything that went into the merge the files' names and sums: "A", "B", "C", taken components, "loras"."""
    used = {"A": [part.files for name, part in job.components.items() if name not in take]}
    used |= {"B": [found.files for found in mixture.b.values()]} if mixture else {}
    used |= {"C": [found.files for found in mixture.c.values()]} if mixture and mixture.c else {}
    used |= {name: [job.components[name].files] for name in take}
    hashes = {letter: sums(paths_of(files)) for letter, files in used.items()}
    return hashes | ({"loras": sums([Path(os.path.expanduser(path)) for path in loras])} if loras else {})


def paths_of(several: Iterable[Files]) -> list[Path]:
    """All files of some components, each once."""
    return list(dict.fromkeys(path for files in several for path in files.location.values()))


def sums(paths: Sequence[Path]) -> dict[str, str]:
    """The files' sha256 by their names, those of a component's folder with its name; hashed side by side."""
    names = [f"{path.parent.name}/{path.name}" if path.parent.name in FAMILY else path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(sha256, paths), strict=True))
