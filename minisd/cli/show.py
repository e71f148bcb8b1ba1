"""Pictures that remember: `minisd show` reads their settings, `minisd replay` makes them again.

Only click is imported here; what needs Pillow or torch is imported when a command runs.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minisd.cli.options import NOT_KEPT, PictureCommand, options
from minisd.files import shown

if TYPE_CHECKING:
    from PIL import Image

    from minisd.metadata.reading import Found

ORIGIN = ("source", "dtype", "weights", "vae", "tokenizer", "prediction", "engine")  # arguments of `load`
HONOURED = ("negative_prompt", "steps", "guidance_scale", "seed", "scheduler", "clip_skip", "guidance_rescale", "eta")


@click.command()
@click.argument("picture")
@options("json")
def show(picture: str, as_json: bool) -> None:
    """Show the settings inside PICTURE: minisd's, AUTOMATIC1111's, ComfyUI's, stable-diffusion.cpp's."""
    from minisd.metadata.reading import read_settings

    found = read_settings(picture)
    if as_json:
        print(json.dumps(vars(found)))
        return
    click.echo(f"made with: {found.program}")
    for name, value in found.settings.items():
        if value not in (None, "", [], (), False):
            click.echo(f"{name}: {shown(value, 4000)}")
    for line in found.lost:
        click.echo(f"not honoured by minisd: {line}")


@click.command(cls=PictureCommand)
@click.argument("picture")
@click.option("-m", "--model", help="Another model than the one that the picture names.")
@options("output", "json", "quiet")
@click.pass_context
def replay(
    context: click.Context, picture: str, model: str | None, output: str | None, as_json: bool, quiet: bool
) -> int:
    """Make PICTURE again from the settings inside it, and say whether it is equal to the bit.

    Exit status 1 where it is not. Of a picture from another program it says what cannot be honoured.
    """
    from minisd.cli.output import png_path
    from minisd.files import write_whole
    from minisd.metadata.reading import read_settings
    from minisd.tasks.pictures import read_picture

    found, old = read_settings(picture), read_picture(picture)
    path = png_path(output or str(Path(picture).with_suffix("")) + "-replayed.png")
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder, "replay.png"))
        if found.record is not None and found.record["call"] == "text_to_image":
            made = call_again(found.record, model, target)
        else:
            made = run_again(context, found, model, target, quiet)
        new = read_picture(made)
        differs = difference(found, made, old, new)
        write_whole(path, made.read_bytes())
    told = {"equal": not differs, "difference": differs, "lost": found.lost, "output": str(path)}
    if as_json:
        print(json.dumps(told))
    else:
        for line in found.lost:
            click.echo(f"not honoured: {line}")
        click.echo(f"not equal: {differs}" if differs else "equal to the bit")
        click.echo(str(path))
    return 1 if differs and found.record is not None else 0


def call_again(record: dict[str, Any], model: str | None, target: str) -> Path:
    """A picture of `StableDiffusion.text_to_image`, as Python called it."""
    import torch

    from minisd.pipeline import StableDiffusion
    from minisd.sampling import Sampling

    if record["missing"]:
        raise ValueError(f"the picture came from a Python call whose {', '.join(record['missing'])} no file can hold")
    load, settings = dict(record["load"]), dict(record["options"])
    if strange := sorted({*settings, *load} - {*vars(Sampling()), *ORIGIN, "prompt"}):
        raise ValueError(f"the picture was made with {shown(strange)}, which this version does not have")
    source, dtype = load.pop("source", "emoji"), load.pop("dtype", "float32")
    sd = StableDiffusion.load(model or source, dtype=None if dtype == "None" else getattr(torch, dtype), **load)
    pictures = sd.text_to_image(settings.pop("prompt"), **settings)
    pictures[record["index"]].save(target)
    return Path(target)


def run_again(context: click.Context, found: "Found", model: str | None, target: str, quiet: bool) -> Path:
    """A picture of a command: the same command with the same options, into another file."""
    from minisd.cli.pictures import COMMANDS as MAKERS

    name, given, index = recorded(found) if found.record is not None else foreign(found, model)
    command = {command.name: command for command in MAKERS}.get(name)
    if command is None:
        raise ValueError(f"the picture was made by `minisd {shown(name)}`, which this version does not have")
    given = {**given, **({"model": model} if model else {}), **dict.fromkeys(NOT_KEPT)}
    known = {parameter.name: parameter for parameter in command.params}
    if unknown := sorted(set(given) - set(known) - set(NOT_KEPT)):
        raise ValueError(f"the picture was made with {shown(unknown)}, which this version's {name} does not have")
    given = {key: known[key].type_cast_value(context, value) for key, value in given.items() if key in known}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        context.invoke(command, **{**given, "output": target, "quiet": quiet, "as_json": True})
    told = json.loads(said.getvalue().splitlines()[-1])
    return Path(told["grid"] if index == "grid" else told["images"][index])


def recorded(found: "Found") -> tuple[str, dict[str, Any], Any]:
    """Command, options and place of one of minisd's pictures. Of several images only its own batch is made again."""
    from minisd.checkpoint.hub import sha256

    record = found.record or {}
    for file, digest in record["files"].items():
        if not Path(file).is_file():
            raise ValueError(f"{file}: the picture was made from this file, which is not there")
        if sha256(Path(file)) != digest:
            raise ValueError(f"{file}: the picture was made from this file, which has changed since")
    options, index = dict(record["options"]), record["index"]
    images = options.get("images_per_prompt", 1)
    if images > 1 and index != "grid":
        size = options.get("batch") or images
        first = index // size * size
        options |= {"seed": options["seed"] + first, "images_per_prompt": min(size, images - first)}
        index -= first
    return record["call"], options, index


def foreign(found: "Found", model: str | None) -> tuple[str, dict[str, Any], Any]:
    """Another program's settings as options of `generate`, or of `guide` where words have weights."""
    settings = found.settings
    if model is None:
        named = f" {settings['model']!r}" if "model" in settings else ""
        raise ValueError(f"the picture was made by {found.program} with a model{named}: name the file with --model")
    given = {name: settings[name] for name in HONOURED if name in settings}
    given |= {"size": f"{settings['width']}x{settings['height']}"} if {"width", "height"} <= set(settings) else {}
    weighted = any(sign in settings["prompt"] + settings["negative_prompt"] for sign in "([")
    given |= {"weighted": True} if weighted else {}
    return "guide" if weighted else "generate", {"prompt": settings["prompt"], **given}, 0


def difference(found: "Found", made: Path, old: "Image.Image", new: "Image.Image") -> str:
    """In what the new picture differs from the old one, and what else is not as it was; "" where nothing differs."""
    import numpy as np

    from minisd.metadata.reading import read_settings
    from minisd.tasks.images import psnr

    if old.size != new.size:
        return f"{old.width}x{old.height} pixels before, {new.width}x{new.height} now"
    apart = np.abs(np.asarray(old).astype(int) - np.asarray(new))
    if not apart.any():
        return ""
    record = read_settings(made).record or {}
    before = found.record or {}
    changed = [name for name in ("minisd", "torch", "device", "dtype", "threads", "model_hash") if name in before]
    causes = [f"{name} {before[name]}, now {record[name]}" for name in changed if before[name] != record[name]]
    size = f"at most {apart.max()} of 255, {psnr(old, new):.1f} dB"
    return f"{size}; {'; '.join(causes)}" if causes else size


COMMANDS = (show, replay)
