"""The workbench's commands. Only click is imported here."""

import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minisd.cli.options import path_and_number
from minisd.files import write_whole

PREDICTIONS = ("epsilon", "v_prediction", "sample")

if TYPE_CHECKING:
    from minisd.lab.weights.convert import Job


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--deep", is_flag=True, help="Read every value: NaN, zeros, limits, spread by block, sha256.")
@click.option("--tree", is_flag=True, help="Sizes by block.")
@click.option("--depth", type=click.IntRange(1), default=3, show_default=True, help="How far down the tree goes.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, one object a PATH and line.")
def inspect(paths: tuple[str, ...], deep: bool, tree: bool, depth: int, as_json: bool) -> None:
    """Say what is in weight files, from their headers: files, folders or shard indexes."""
    from minisd.lab.weights import report as words
    from minisd.lab.weights.inspect import inspect

    for path in paths:
        report = inspect(path)
        said: dict[str, Any] = report.as_dict()
        told = [*words.lines(report), *words.tree(report, depth if tree else 0)]
        if deep:
            from minisd.lab.weights import scan

            findings = scan.scan(report)
            said["values"] = vars(findings)
            told += scan.lines(findings)
        click.echo(json.dumps(said) if as_json else "\n".join(told))


@click.command()
@click.argument("path", required=False)
@click.option("--grep", metavar="TEXT", help="Only rows with this in one of their names.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, one list a row.")
def keys(path: str | None, grep: str | None, as_json: bool) -> None:
    """One weight, three names: SD 1.5's table; or what each tensor of the file PATH is."""
    from minisd.lab.weights.inspect import inspect
    from minisd.lab.weights.report import aligned, file_table, key_table

    if path is None:
        header, rows = ("minisd", "diffusers", "CompVis", "shape"), list(key_table())
    else:
        report = inspect(path)
        header, rows = ("minisd", "in the file", "dtype", "shape"), list(file_table(report))
    rows = [row for row in rows if grep is None or any(grep in cell for cell in row[:3])]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return
    for line in aligned([header, *rows]):
        click.echo(line)


def number_of_bytes(_: click.Context, __: click.Parameter, text: str | None) -> int | None:
    """ "2GB", "500MB" or plain bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]+)?) *(kB|MB|GB|)", text)
    if not found:
        raise click.BadParameter(f"{text!r} is not a size such as 2GB or 500MB")
    return int(float(found[1]) * {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]])


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--to", "layout", type=click.Choice(["diffusers", "compvis"]), help="[default: by TARGET's name]")
@click.option("--component", type=click.Choice(["unet", "vae", "text_encoder"]), help="Only this one.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="[default: as it is]")
@click.option("--weights", type=click.Choice(["auto", "ema", "raw"]), default="auto", help="If a file has two sets.")
@click.option("--lean", is_flag=True, help="Leave out what is not the model.")
@click.option("--shard-size", callback=number_of_bytes, metavar="SIZE", help="At most so much a file, such as 2GB.")
@click.option(
    "--prediction", type=click.Choice(PREDICTIONS), help="What the UNet predicts. [default: what SOURCE says]"
)
@click.option("--tokenizer", metavar="FOLDER", help="The model's tokenizer, where SOURCE lacks it.")
@click.option("--from-pickle", is_flag=True, help="SOURCE is a .ckpt, .pt or .bin; nothing in it is executed.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def convert(source: str, target: str, dtype: str | None, from_pickle: bool, quiet: bool, **settings: Any) -> None:
    """Write the model SOURCE as TARGET in another layout or dtype: a folder, or a file if it ends in .safetensors."""
    import torch

    from minisd.lab.weights.convert import Conversion, opened, plan

    with opened(source, target, from_pickle) as readable:
        number = getattr(torch, dtype) if dtype else None
        carry_out(plan(Conversion(source=readable, target=target, dtype=number, **settings)), quiet)


def carry_out(job: "Job", quiet: bool) -> None:
    """Write what is planned, with a progress bar, and say where."""
    from tqdm import tqdm

    from minisd.checkpoint.save import into_place
    from minisd.lab.weights.convert import run

    for note in job.checkpoint.notes if job.checkpoint else ():
        click.echo(f"warning: {note}", err=True)
    with tqdm(total=job.bytes, unit="B", unit_scale=True, leave=False, disable=True if quiet else None) as bar:
        into_place(job.target, lambda place: run(job, place, bar.update))
    click.echo(job.target)


@click.command()
@click.argument("sources", metavar="A [B]", nargs=-1, required=True)
@click.argument("target")
@click.option("-w", "--weight", type=float, default=0.5, show_default=True, help="B's share, usually 0 to 1.")
@click.option("--minus", metavar="C", help="Add the difference: A + w (B - C).")
@click.option("--slerp", is_flag=True, help="Along the arc from A to B.")
@click.option("--blocks", metavar="N,N,...", help="25 shares: IN00-11, M00, OUT00-11; or 26, the rest's in front.")
@click.option("--take", multiple=True, metavar="COMPONENT=PATH", help="unet, vae or text_encoder from elsewhere.")
@click.option("--lora", "loras", multiple=True, metavar="PATH[:SCALE]", help="Bake a LoRA in; again for more.")
@click.option("--to", "layout", type=click.Choice(["diffusers", "compvis"]), help="[default: by TARGET's name]")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="[default: as in A]")
@click.option("--weights", type=click.Choice(["auto", "ema", "raw"]), default="auto", help="If a file has two sets.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def merge(
    sources: tuple[str, ...],
    target: str,
    blocks: str | None,
    take: tuple[str, ...],
    loras: tuple[str, ...],
    dtype: str | None,
    quiet: bool,
    **settings: Any,
) -> None:
    """Mix the model B into A and write TARGET; or only give A another component, or LoRAs."""
    import torch

    from minisd.lab.weights.merge import Merge, prepare

    if len(sources) > 2:
        raise ValueError(f"merge takes two models and a target, not {len(sources)} models: merge two, then the next")
    wanted = Merge(
        a=sources[0],
        b=sources[1] if len(sources) > 1 else None,
        target=target,
        blocks=numbers(blocks) if blocks is not None else None,
        take=components_and_paths(take),
        loras=[path_and_number(text) for text in loras],
        dtype=getattr(torch, dtype) if dtype else None,
        **settings,
    )
    carry_out(prepare(wanted), quiet)


def numbers(text: str) -> list[float]:
    """ "0, 0.5, 1" -> numbers."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"--blocks {text!r} is not a list of numbers such as 0,0.5,1") from None


def components_and_paths(texts: tuple[str, ...]) -> dict[str, str]:
    """ "vae=other.safetensors" and so on, each component once."""
    found: dict[str, str] = {}
    for text in texts:
        component, equals, path = text.partition("=")
        if not equals:
            raise click.BadParameter(f"--take {text!r} is not COMPONENT=PATH, such as vae=other.safetensors")
        if component in found:
            raise click.BadParameter(f"--take {component}=... is there twice")
        found[component] = path
    return found


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--plot", metavar="OUT.png", help="Also draw the change of each block as a bar.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def diff(a: str, b: str, as_json: bool, plot: str | None, quiet: bool) -> None:
    """Compare two checkpoints, whatever their layout and precision: what changed, where, and how much."""
    from tqdm import tqdm

    from minisd.lab.weights.diff import bars, compare, lines

    target = Path(plot) if plot else None
    if target and (target.suffix != ".png" or not target.parent.is_dir()):
        raise ValueError(f"{target}: must be a name that ends in .png, in a folder that exists")
    with tqdm(unit="weight", leave=False, disable=True if quiet else None) as bar:
        difference = compare(a, b, advance=bar.update)
    if target:
        image = io.BytesIO()
        bars(difference.blocks).save(image, "PNG")
        write_whole(target, image.getvalue())
    click.echo(json.dumps(difference.as_dict()) if as_json else "\n".join(lines(difference)))
    if target and not as_json:
        click.echo(target)


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, mps.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def selftest(device: str, dtype: str, as_json: bool) -> int:
    """Does this machine give the reference numbers? Exit status: 0 yes, 1 no."""
    from minisd.lab.selftest import run

    return run(device, dtype, as_json)


COMMANDS = (inspect, keys, convert, diff, merge, selftest)
