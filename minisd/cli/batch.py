"""The commands of `minisd.batch`: sample, score. Only click is imported here; what needs torch, when a command runs."""

import hashlib
import itertools
import json
import os
from contextlib import suppress
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minisd.cli.options import MODEL, REPORT, RUN, PictureCommand, options

if TYPE_CHECKING:
    from minisd.batch.classes import ClassModel
    from minisd.batch.work import Order
    from minisd.pipeline import StableDiffusion

SHARED = (
    *(*MODEL, "negative", "steps", "guidance", "guidance-rescale", "size", "scheduler", "eta", "clip-skip"),
    *("long-prompts", *RUN, *REPORT),
)
# What decides which model is loaded, and how.
LOADED = ("model", "vae", "tokenizer", "weights", "prediction", "loras", "embeddings", *RUN)
# What may be varied by --grid: the option's name -> the parameter's.
VARIED = {
    "steps": "steps",
    "guidance": "guidance_scale",
    "guidance-rescale": "guidance_rescale",
    "scheduler": "scheduler",
    "eta": "eta",
    "clip-skip": "clip_skip",
}


@click.command(cls=PictureCommand)
@click.argument("places", nargs=-1, metavar="PROMPTS OUT")
@options(
    "per-prompt", "shard-size", "base-seed", "format", "many", "threads", "worker", "on", "status", "grid", *SHARED
)
def sample(places: tuple[str, ...], status: bool, grid: tuple[str, ...], **options: Any) -> None:
    """Generate many pictures into folder OUT, from the prompts in a .txt, .csv, .jsonl or .parquet file PROMPTS.

    Shards of a webdataset; started again, it makes what is missing. With --grid, a folder for each combination.
    """
    from minisd.batch.shards import status as status_of

    if status:
        if len(places) != 1:
            raise click.UsageError("--status: name the folder, and nothing else")
        return tell(status_of(Path(places[0])), options["as_json"])
    if len(places) < 2 or (len(places) > 2 and not grid):
        raise click.UsageError("name a file of prompts and the folder to write to")
    prompts, out = Path(places[0]), Path(places[1])
    cells = cells_of((*grid, *places[2:]))
    made = {}
    for cell in cells:
        folder = out / ",".join(f"{name}={shortest(value)}" for name, value in cell.items())
        run(prompts, folder, options | {VARIED[name]: value for name, value in cell.items()})
        made[str(folder)] = status_of(folder)
    for place, found in made.items():
        tell(found | {"output": place}, options["as_json"])
    return None


def cells_of(grid: tuple[str, ...]) -> list[dict[str, Any]]:
    """NAME=V1,V2 each -> every combination; one without settings where nothing is varied."""
    axes = {}
    for text in grid:
        name, equals, values = text.partition("=")
        if name not in VARIED or not equals or not values:
            raise ValueError(f"--grid {text}: must be NAME=VALUE,VALUE with a NAME of {', '.join(VARIED)}")
        context = click.Context(sample)
        parameter = next(one for one in sample.params if one.name == VARIED[name])
        axes[name] = [parameter.type_cast_value(context, value) for value in values.split(",")]
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def shortest(value: Any) -> str:
    """4.0 -> "4"."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def run(prompts: Path, folder: Path, options: dict[str, Any]) -> None:
    """Make what is missing in one folder."""
    from tqdm import tqdm

    from minisd.batch.work import missing, run_here, run_on_ray

    order = order_of(prompts, folder, options)
    on_ray = options["on"] == "ray"
    worker, workers = which_worker(options["worker"], on_ray)
    order.plan.claim(folder)
    left = sum(len(order.plan.items(shard)) for shard in missing(order, worker, workers))
    with tqdm(total=left, unit="picture", disable=options["quiet"] or None) as bar:
        if on_ray:
            run_on_ray(order, bar.update)
        else:
            run_here(order, worker, workers, bar.update)


def order_of(prompts: Path, folder: Path, options: dict[str, Any]) -> "Order":
    """What to make, from the options."""
    import torch

    from minisd.batch.prompts import read_prompts
    from minisd.batch.work import Order
    from minisd.cli.job import check_eta, choose_device_and_dtype, sampling_options
    from minisd.sampling import Sampling

    rows = read_prompts(prompts)
    device, dtype = choose_device_and_dtype(options)
    sampling = Sampling(**sampling_options(options))
    check_eta(sampling)
    names = ("model", "vae", "tokenizer", "weights", "prediction", "scheduler", "eta", "clip_skip", "long_prompts")
    described = {
        name: options[name] for name in (*names, "negative_prompt", "guidance_rescale", "engine", "tile", "format")
    }
    adapters = {name: [[text, file_hash(text)] for text in options[name]] for name in ("loras", "embeddings")}
    described |= {**adapters, "device": device.partition(":")[0], "dtype": str(dtype).removeprefix("torch.")}
    threads = options["threads"] or told_threads(folder) or torch.get_num_threads()
    load = partial(load_model, json.dumps({name: options[name] for name in LOADED}))
    counts = options["per_prompt"], options["shard_size"], options["batch"], options["base_seed"], threads
    return Order(load, rows, sampling, folder, *counts, described)


def told_threads(folder: Path) -> int | None:
    """The number of threads that a folder was begun with."""
    from minisd.batch.plan import FILE
    from minisd.files import read_json_object

    return read_json_object(folder / FILE).get("threads") if (folder / FILE).is_file() else None


def file_hash(text: str) -> str:
    """Of the file in PATH[:SCALE] or PATH[:TOKEN], where there is one."""
    path = next((Path(one) for one in (text, text.rpartition(":")[0]) if one and Path(one).is_file()), None)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


@lru_cache(maxsize=1)
def load_model(told: str) -> "StableDiffusion | ClassModel":
    """The model with its adapters, once for all cells of a grid; also in a worker process of Ray. `told`: as JSON."""
    from minisd.batch.classes import ClassModel, is_pixels
    from minisd.cli.job import choose_device_and_dtype, load, load_adapters
    from minisd.pixel.pipeline import PixelDiffusion

    options = json.loads(told)
    if is_pixels(options["model"]):
        device, dtype = choose_device_and_dtype(options)
        return ClassModel(PixelDiffusion.load(options["model"], dtype=dtype, device=device))
    sd = load(options)
    load_adapters(sd, options["loras"], options["embeddings"])
    return sd


def which_worker(text: str | None, on_ray: bool) -> tuple[int, int]:
    """Which worker this is, 0, 1, ..., and of how many: as --worker says, or torchrun's variables."""
    if text is None:
        return (0, 1) if on_ray else (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if on_ray:
        raise ValueError("--worker: Ray gives its workers their shards; give one of --worker and --on")
    worker, _, workers = text.partition("/")
    if not (worker.isdecimal() and workers.isdecimal() and 1 <= int(worker) <= int(workers)):
        raise ValueError(f"--worker {text}: must be K/N with K from 1 to N: 1/3, 2/3, 3/3")
    return int(worker) - 1, int(workers)


def tell(found: dict[str, Any], as_json: bool) -> None:
    """A status, as text or as JSON."""
    if as_json:
        return click.echo(json.dumps(found))
    speed = f", {found['pictures_a_second']} a second by each worker" if found["pictures_a_second"] else ""
    left = found["worker_seconds_left"]
    rest = f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left for one worker" if left else ""
    click.echo(
        f"{found['pictures']} of {found['of']} pictures, {found['shards']} of {found['of_shards']} shards{speed}{rest}"
    )
    if "output" in found:
        click.echo(found["output"])
    return None


@click.command(cls=PictureCommand)
@click.argument("out")
@options("reference", "features", "metric", "json")
def score(out: str, reference: str | None, features: str | None, metrics: tuple[str, ...], as_json: bool) -> None:
    """Measure the pictures that `minisd sample` made in OUT, or each cell of a grid, beside those of a reference.

    The numbers go to OUT/scores.csv, .md, .json (with all that they depend on) and .png.
    """
    try:
        from minisd.batch import score as scoring
        from minisd.batch.features import NETWORKS

        import_module("torchmetrics")
    except ImportError:
        raise ValueError("minisd score needs torchmetrics: pip install 'minisd[score]'") from None
    folder, other = Path(out), Path(reference) if reference else None
    if other is not None and not other.is_dir():
        raise FileNotFoundError(f"{other}: no such folder")
    chosen = metrics or (("fid", "kid") if other else ("clip",))
    features = features or "inception"
    cells = scoring.cells(folder)
    fetched = [NETWORKS[features][1] and f"{features}, {NETWORKS[features][1]}"] if {"fid", "kid"} & set(chosen) else []
    for what in filter(None, [*fetched, *(scoring.METRICS[name] for name in chosen)]):
        click.echo(f"fetched at the first use: {what}", err=True)
    try:
        scores = scoring.score(cells, other, features, chosen)
    except ImportError as error:
        raise ValueError(f"{error} (pip install 'minisd[score]')") from None
    rows = [varied(cell, folder) | row for cell, row in zip(cells, scores, strict=True)]
    told = scoring.provenance(cells[0], other, features)
    text = scoring.write_table(folder, rows, told)
    axes = list(varied(cells[0], folder))
    if axes:
        scoring.plot(folder, rows, axes[0], chosen)
    click.echo(json.dumps({"rows": rows, **told}) if as_json else text)


def varied(cell: Path, folder: Path) -> dict[str, Any]:
    """The settings that make a cell, from its name: "steps=10,eta=0.5" -> {"steps": 10, "eta": 0.5}."""
    parts = cell.name.split(",") if cell != folder else []
    return {name: number(value) for name, _, value in (part.partition("=") for part in parts)}


def number(text: str) -> Any:
    """The number that a text is, or the text."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


COMMANDS = (sample, score)
