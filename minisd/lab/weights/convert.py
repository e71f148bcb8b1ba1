"""One checkpoint, another form: either layout to either layout, one component, another dtype, shards.

    convert("model.safetensors", "folder")                          # CompVis -> diffusers
    convert("folder", "model.safetensors", dtype=torch.float16)     # and back, in half the bytes

Values stream from file to file (see `streaming.py`). What a folder has no place for travels along: what stood beside
the model in a single file goes to `leftovers.safetensors`, with the file's metadata, and comes back from there (see
`leftovers.py`). A result has its name only when it is whole and was checked.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minisd.checkpoint import configs
from minisd.checkpoint.header import Files, open_files
from minisd.checkpoint.hub import ALL_STEMS, index_name, single_name
from minisd.checkpoint.keymap import FAMILY, KEYS, Key, prefixes
from minisd.checkpoint.load import Checkpoint, check_parts, open_alone, open_checkpoint, read_tokenizer
from minisd.checkpoint.naming import EMBEDDING, LORA, stranger
from minisd.checkpoint.save import check_replaceable, folder_of, into_place, write_json, write_settings
from minisd.checkpoint.survey import Part
from minisd.checkpoint.values import Values
from minisd.files import CheckpointError
from minisd.lab.weights import leftovers
from minisd.lab.weights.pickles import unpickle
from minisd.lab.weights.streaming import Entry, copied, weight, write_file

LAYOUTS = ("diffusers", "compvis")

Advance = Callable[[int], object]  # told how many bytes were written


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to write, settled before the first byte is written."""

    target: Path
    layout: str
    checkpoint: Checkpoint | None  # None for a single component
    entries: dict[str, list[Entry]]  # component -> its tensors under the target's names
    leftovers: list[Entry]
    metadata: dict[str, str]  # of a single file; of the leftovers in a folder
    shard_size: int | None = None
    components: dict[str, Part] = field(default_factory=dict)
    recipe: dict[str, str] = field(default_factory=dict)  # metadata for every file: how a merge was made

    @property
    def bytes(self) -> int:
        """What will be written, but for headers and settings."""
        return sum(one.bytes for part in (*self.entries.values(), self.leftovers) for one in part)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is asked for; see `convert`. `take`: components to have from elsewhere."""

    source: str | os.PathLike[str]
    target: str | os.PathLike[str]
    layout: str | None = None
    component: str | None = None
    dtype: torch.dtype | None = None
    weights: str = "auto"
    lean: bool = False
    shard_size: int | None = None
    take: Mapping[str, str | os.PathLike[str]] = field(default_factory=dict)
    tokenizer: str | os.PathLike[str] | None = None
    prediction: str | None = None


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str | None = None,
    component: str | None = None,
    dtype: torch.dtype | None = None,
    weights: str = "auto",
    lean: bool = False,
    shard_size: int | None = None,
    from_pickle: bool = False,
    tokenizer: str | os.PathLike[str] | None = None,
    prediction: str | None = None,
    advance: Advance = lambda _: None,
) -> Path:
    """Write the model at `source` to `target` in another form; returns `target`.

    `layout`: "diffusers" or "compvis"; by default compvis for a name that ends in .safetensors. `component`: only
    "unet", "vae" or "text_encoder". `dtype`: cast every weight; None keeps each one's own. `weights`: "auto", "ema" or
    "raw", where there are two sets. `lean` leaves out what is not the model. `shard_size`: at most so many bytes a file
    (diffusers' layout). `from_pickle`: the source is a `.ckpt`, `.pt` or `.bin` (see `pickles.py`); nothing in it is
    executed. `tokenizer`: a folder with the model's, where the source lacks it. `prediction`: "epsilon",
    "v_prediction" or "sample", where the source does not say what its UNet predicts, or says it wrongly. `advance` is
    told of every piece written.

    Raises CheckpointError for a source that cannot be used, ValueError for settings that are impossible,
    FileExistsError where something else than a model is in the way.
    """
    with opened(source, target, from_pickle) as readable:
        job = plan(
            Conversion(
                source=readable, target=target, layout=layout, component=component, dtype=dtype, weights=weights,
                lean=lean, shard_size=shard_size, tokenizer=tokenizer, prediction=prediction,
            )
        )  # fmt: skip
        into_place(job.target, lambda place: run(job, place, advance))
    return job.target


@contextmanager
def opened(
    source: str | os.PathLike[str], target: str | os.PathLike[str], from_pickle: bool
) -> Iterator[str | os.PathLike[str]]:
    """The source; a pickle's tensors as a safetensors file beside the target, for as long as they are needed."""
    if not from_pickle:
        yield source
        return
    path, beside = Path(os.path.expanduser(source)), Path(os.path.expanduser(target)).parent
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_apart(Path(os.path.expanduser(target)), [path])
    beside.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unpickled-", dir=beside) as scratch:
        copy = Path(scratch) / f"{path.stem}.safetensors"
        try:
            yield unpickle(path, copy)
        except CheckpointError as error:  # people know the pickle, not its copy
            raise CheckpointError(str(error).replace(str(copy), str(path))) from None


def plan(wanted: Conversion) -> Job:
    """Read the headers and settle everything. Nothing is written."""
    target = Path(os.path.expanduser(wanted.target))
    layout = wanted.layout or ("compvis" if target.suffix == ".safetensors" else "diffusers")
    check(target, layout, wanted)
    check_apart(target, [wanted.source])
    if wanted.component is not None:
        return plan_component(wanted, wanted.component, target, layout)
    adapter = adapter_file(wanted.source)
    if adapter is not None and not wanted.take:
        return as_it_is(adapter, target)
    return plan_model(wanted, target, layout)


def plan_component(wanted: Conversion, component: str, target: Path, layout: str) -> Job:
    """A component alone."""
    part = open_alone(wanted.source, component, weights=wanted.weights)
    entries = rename(part, layout, prefixes({component: part.config})[component], wanted.dtype)
    return Job(
        target=target, layout=layout, checkpoint=None, entries={component: entries}, leftovers=[],
        metadata=leftovers.of_component(component, part.config, entries), shard_size=wanted.shard_size,
        components={component: part},
    )  # fmt: skip


def plan_model(wanted: Conversion, target: Path, layout: str) -> Job:
    """A whole model, with what stands beside it."""
    vae = wanted.take.get("vae")
    checkpoint = open_checkpoint(
        wanted.source,
        dtype=None,
        weights=wanted.weights,
        vae=vae,
        tokenizer=wanted.tokenizer,
        prediction=wanted.prediction,
    )
    for name in wanted.take.keys() - {"vae"}:
        checkpoint.components[name] = open_alone(wanted.take[name], name, weights=wanted.weights)
    check_parts(checkpoint)
    parts = checkpoint.components
    prefix = prefixes(vars(checkpoint.config))
    entries = {name: rename(part, layout, prefix[name], wanted.dtype) for name, part in parts.items()}
    beside, metadata = (None, {}) if wanted.lean else leftovers.beside(checkpoint)
    spare = [copied(beside, name, name, info.shape) for name, info in beside.tensors.items()] if beside else []
    if wanted.prediction not in (None, "v_prediction"):  # a marker tensor would say otherwise
        spare = [one for one in spare if one.name != "v_pred"]
    if layout == "compvis":
        weights_of_all = [one for part in entries.values() for one in part]
        others = [one.name for one in spare]
        metadata = leftovers.with_settings(metadata, checkpoint, weights_of_all, others, target.stem)
    return Job(
        target=target, layout=layout, checkpoint=checkpoint, entries=entries, leftovers=spare,
        metadata=metadata, shard_size=wanted.shard_size, components=checkpoint.components,
    )  # fmt: skip


def adapter_file(source: str | os.PathLike[str]) -> Files | None:
    """The file, if it is a LoRA or an embedding."""
    path = Path(os.path.expanduser(source))
    files = open_files([path], path) if path.is_file() and path.suffix == ".safetensors" else None
    return files if files and stranger(files.tensors) in (LORA, EMBEDDING) else None


def as_it_is(files: Files, target: Path) -> Job:
    """What has one layout only: the same tensors in a safetensors file (out of a pickle, usually)."""
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: {files.path.name} is {stranger(files.tensors)}; choose a name in .safetensors")
    entries = [copied(files, name, name, info.shape) for name, info in files.tensors.items()]
    return Job(
        target=target, layout="compvis", checkpoint=None, entries={}, leftovers=entries, metadata=dict(files.metadata)
    )


def check(target: Path, layout: str, wanted: Conversion) -> None:
    """Raise for settings that make no sense, and for a place that is taken."""
    component, dtype, shard_size = wanted.component, wanted.dtype, wanted.shard_size
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: must be one of {', '.join(LAYOUTS)}")
    if component is not None and component not in FAMILY:
        raise ValueError(f"component={component!r}: must be one of {', '.join(FAMILY)}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: weights are floating point")
    if shard_size is not None and (layout != "diffusers" or target.suffix == ".safetensors" or shard_size < 1):
        raise ValueError(f"shard_size={shard_size}: a number of bytes, for a folder in diffusers' layout only")
    if layout == "diffusers" and component is None and target.suffix == ".safetensors":
        raise ValueError(
            f"{target}: diffusers' layout is a folder; choose a name without .safetensors, or one component"
        )
    if layout == "compvis" and target.suffix != ".safetensors":
        raise ValueError(f"{target}: the compvis layout is one file; choose a name that ends in .safetensors")
    check_replaceable(target, file=target.suffix == ".safetensors", component=component is not None)


def check_apart(target: Path, sources: Iterable[str | os.PathLike[str]]) -> None:
    """Raise ValueError where writing the target would replace a source."""
    place = target.resolve()
    for source in sources:
        path = Path(os.path.expanduser(source))
        if path.exists() and place in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{target}: would replace {source}, which is read; choose another name")


def rename(part: Part, layout: str, prefix: str, dtype: torch.dtype | None) -> list[Entry]:
    """A component's tensors under the names and in the shapes of a layout; `prefix`: of a single file's names."""
    values = Values(part.files, part.match)
    return [
        weight(values, key.minisd, *place_of(key, prefix, layout), dtype) for key in KEYS[part.component](part.config)
    ]


def place_of(key: Key, prefix: str, layout: str) -> tuple[str, tuple[int, ...]]:
    """What a layout calls a weight, and the shape that it gives it."""
    if layout == "diffusers":
        return key.diffusers, key.shape
    return prefix + key.compvis, key.compvis_shape


# ---- writing ---------------------------------------------------------------------------------------------


def run(job: Job, place: Path, advance: Advance) -> None:
    """Write everything under the temporary name `place`."""
    if job.target.suffix == ".safetensors":
        every = [one for entries in job.entries.values() for one in entries]
        write_file(place, every + job.leftovers, (job.metadata or {"format": "pt"}) | job.recipe, advance)
        return
    for component, entries in job.entries.items():
        folder = place if job.checkpoint is None else place / folder_of(component, job.checkpoint.config)
        folder.mkdir(parents=True)
        metadata = {"format": "pt"} | job.recipe
        write_shards(folder, ALL_STEMS[component], entries, job.shard_size, metadata, advance)
        if job.checkpoint is None:
            write_json(folder / "config.json", configs.WRITERS[component](job.components[component].config))
    if job.checkpoint is not None:
        words = read_tokenizer(job.checkpoint)
        write_settings(place, job.checkpoint.config, words, job.checkpoint.generation)
        if job.leftovers or job.metadata:
            write_file(place / leftovers.FILE, job.leftovers, job.metadata, advance)


def write_shards(
    folder: Path, stem: str, entries: list[Entry], most: int | None, metadata: dict[str, str], advance: Advance
) -> None:
    """One file, or several of at most `most` bytes (a larger tensor has one of its own) with their index."""
    shards = list(divide(entries, most))
    if len(shards) == 1:
        write_file(folder / single_name(stem, ""), entries, metadata, advance)
        return
    table: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, metadata, advance)
        table |= {one.name: name for one in shard}
    total = sum(one.bytes for one in entries)
    write_json(folder / index_name(stem, ""), {"metadata": {"total_size": total}, "weight_map": table})


def divide(entries: list[Entry], most: int | None) -> Iterable[list[Entry]]:
    """Runs of entries of at most `most` bytes together."""
    run: list[Entry] = []
    size = 0
    for one in entries:
        if run and most is not None and size + one.bytes > most:
            yield run
            run, size = [], 0
        run.append(one)
        size += one.bytes
    yield run
