"""What `minisd generate` does: load, paint, write. The painting itself is `pipeline.py`. Other commands build on it."""

import io
import json
import math
import os
import re
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import minisd
from minisd.adapters import path_and_scale
from minisd.files import write_whole
from minisd.pipeline import StableDiffusion, Step, to_pictures
from minisd.tasks.images import fitting_size

SomeStep = TypeVar("SomeStep", bound=Step)


@dataclass
class Settings:
    """All that makes a picture: enough to make it again."""

    prompt: str
    negative: str
    steps: int
    scheduler: str
    guidance: float
    guidance_rescale: float
    eta: float
    clip_skip: int
    seed: int
    width: int
    height: int
    model: str
    extra: dict[str, Any] = field(default_factory=dict)  # what a task adds

    def parameters(self, seed: int) -> str:
        """The `parameters` text that other programs read out of a PNG."""
        parts = {
            "Steps": self.steps,
            "Sampler": self.scheduler.upper(),
            "CFG scale": f"{self.guidance:g}",
            "CFG rescale": f"{self.guidance_rescale:g}" if self.guidance_rescale else None,
            "Eta": f"{self.eta:g}" if self.eta else None,
            "Clip skip": self.clip_skip + 1 if self.clip_skip else None,  # others count the layers from 1
            "Seed": seed,
            "Size": f"{self.width}x{self.height}",
            **{name.replace("_", " ").capitalize(): quoted(str(value)) for name, value in self.extra.items()},
            "Model": quoted(self.model),
            "Version": f"minisd {minisd.__version__}",
        }
        lines = [self.prompt, f"Negative prompt: {self.negative}" if self.negative else None]
        lines.append(", ".join(f"{name}: {value}" for name, value in parts.items() if value is not None))
        return "\n".join(line for line in lines if line is not None)


def quoted(text: str) -> str:
    """`text` as others write it among parameters: as JSON if it has their separators, or surrogates."""
    return text if re.fullmatch(r"[^,:\n\ud800-\udfff]*", text) else json.dumps(text)


@dataclass
class Paths:
    """Where the pictures go: one path a picture, and one for the grid where there are several."""

    output: Path
    images: list[Path] = field(default_factory=list)

    @property
    def grid(self) -> Path | None:
        return self.output if len(self.images) > 1 else None


def run(*, check: bool = False, **options: Any) -> None:
    """Paint and write (see `minisd generate --help`)."""
    job = prepare(**options)
    if check:
        return run_checked(job)
    return job.write(job.paint(job.sd.denoise(job.settings.prompt, **job.denoising())))


def run_checked(job: "Job") -> None:
    """Paint and write, and say where the first value is that is not finite, and how large values get."""
    from minisd.lab.finite import nan_tracer

    with nan_tracer(job.sd) as trace, np.errstate(invalid="ignore"):  # NaN becomes some byte
        pictures = job.paint(job.sd.denoise(job.settings.prompt, **job.denoising()))
    if not job.as_json:
        print(*trace.lines(), sep="\n", file=sys.stderr)
    job.write(pictures, check=trace.as_dict())


def prepare(
    *,
    prompt: str,
    output: str | None,
    model: str,
    vae: str | None,
    weights: str,
    negative: str,
    steps: int | None,
    guidance: float | None,
    guidance_rescale: float,
    size: tuple[int, int] | None,
    clip_skip: int,
    device: str,
    dtype: str,
    as_json: bool,
    quiet: bool,
    loras: tuple[str, ...] = (),
    embeddings: tuple[str, ...] = (),
    seed: int | None = None,
    scheduler: str = "ddim",
    eta: float = 0.0,
    images: int = 1,
    steps_dir: str | None = None,
    picture: Image.Image | None = None,
    **extra: Any,
) -> "Job":
    """Load the model and settle every setting; everything is checked before anything is written.

    The size is the one asked for, or that of `picture`, or the model's. `extra`: what a task has in its settings.
    """
    started = time.perf_counter()
    if eta and scheduler == "ddpm":
        raise ValueError("eta is an option of ddim; ddpm is always as random as eta 1")
    drawn = secrets.randbelow(2**32) if seed is None else seed
    paths = plan_paths(output, prompt, drawn, images)
    if steps_dir is not None:
        check_folder(Path(steps_dir))
    sd = load(model, vae, weights, device, dtype)
    extra |= load_adapters(sd, loras, embeddings)
    height, width = reversed(size) if size else fitting_size(sd, picture) if picture else (None, None)
    height, width = sd.latent_size(height, width)
    factor = sd.vae.config.downsampling
    settings = Settings(
        prompt=prompt,
        negative=negative,
        steps=sd.generation.get("steps", 50) if steps is None else steps,
        scheduler=scheduler,
        guidance=sd.generation.get("guidance_scale", 7.5) if guidance is None else guidance,
        guidance_rescale=guidance_rescale,
        eta=eta,
        clip_skip=clip_skip,
        seed=drawn,
        width=width * factor,
        height=height * factor,
        model=model,
        extra=extra,
    )
    folder = Path(steps_dir) if steps_dir else None
    return Job(sd, settings, paths, images, folder, quiet, as_json, started, drawn=seed is None)


@dataclass
class Job:
    """A command at work: the model, what to paint, and where it goes."""

    sd: StableDiffusion
    settings: Settings
    paths: Paths
    images: int
    steps_dir: Path | None
    quiet: bool
    as_json: bool
    started: float
    drawn: bool  # nobody gave a seed: say which it was

    def denoising(self) -> dict[str, Any]:
        """The settings as `denoise` and the tasks take them. Each picture has a seed of its own: seed, seed + 1, ..."""
        settings = self.settings
        return {
            "negative_prompt": settings.negative,
            "steps": settings.steps,
            "guidance_scale": settings.guidance,
            "guidance_rescale": settings.guidance_rescale,
            "height": settings.height,
            "width": settings.width,
            "generator": [torch.Generator().manual_seed(settings.seed + offset) for offset in range(self.images)],
            "scheduler": settings.scheduler,
            "eta": settings.eta,
            "images_per_prompt": self.images,
            "clip_skip": settings.clip_skip,
        }

    def progress(self, steps: Iterable[SomeStep], total: int | None = None) -> Iterator[SomeStep]:
        """The same steps, under a progress bar."""
        total = self.settings.steps if total is None else total
        yield from tqdm(steps, total=total, unit="step", leave=False, disable=True if self.quiet else None)

    @torch.no_grad()
    def paint(self, denoising: Iterable[Step], steps: int | None = None) -> list[Image.Image]:
        """Run a sampling loop of `steps` steps under a progress bar, and decode where it ends."""
        for step in self.progress(denoising, steps):
            if self.steps_dir is not None:
                self.steps_dir.mkdir(exist_ok=True)
                foreseen = make_grid(to_pictures(self.sd.decode(step.x0)))
                name = f"step-{step.index + 1:03}-t{step.timestep:03}.png"
                write_png(self.steps_dir / name, foreseen, self.settings.parameters(self.settings.seed))
        return to_pictures(self.sd.decode(step.latents))

    def write(
        self,
        pictures: list[Image.Image],
        together: Callable[[list[Image.Image]], Image.Image] | None = None,
        last: Path | None = None,
        **found: Any,
    ) -> None:
        """Write the pictures, and all of them in one (a grid), and say so.

        `last`: a file that is written already, to be named last; `found`: what else JSON should tell.
        """
        settings, paths = self.settings, self.paths
        if self.drawn:
            print(f"seed {settings.seed}", file=sys.stderr)
        for offset, (path, picture) in enumerate(zip(paths.images, pictures, strict=True)):
            write_png(path, picture, settings.parameters(settings.seed + offset))
        if paths.grid:
            write_png(paths.grid, (together or make_grid)(pictures), settings.parameters(settings.seed))
        files = {"images": [str(path) for path in paths.images], "grid": str(paths.grid) if paths.grid else None}
        told = {key: value for key, value in vars(settings).items() if key != "extra"} | settings.extra
        written = [*paths.images, *([paths.grid] if paths.grid else []), *([last] if last else [])]
        report(
            written, {**files, **told, **found, "seconds": round(time.perf_counter() - self.started, 2)}, self.as_json
        )


def load(model: str, vae: str | None, weights: str, device: str, dtype: str) -> StableDiffusion:
    """Load the model; float32 on a CPU and float16 on an accelerator unless asked otherwise."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if dtype == "auto":
        dtype = "float32" if device.startswith("cpu") else "float16"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sd = StableDiffusion.load(model, dtype=getattr(torch, dtype), device=device, weights=weights, vae=vae)
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
    return sd


def load_adapters(sd: StableDiffusion, loras: tuple[str, ...], embeddings: tuple[str, ...]) -> dict[str, str]:
    """Load PATH[:SCALE] LoRAs and PATH[:TOKEN] embeddings; returns what belongs among a picture's settings."""
    for lora in loras:
        sd.load_lora(*path_and_scale(lora))
    for embedding in embeddings:
        path, _, token = embedding.rpartition(":")
        named = path and not os.path.exists(os.path.expanduser(embedding))
        words = sd.load_embedding(path, token) if named else sd.load_embedding(embedding)
        print(f"{embedding}: in prompts as {', '.join(words)}", file=sys.stderr)
    told = {"lora": loras, "embedding": embeddings}
    return {name: ", ".join(given) for name, given in told.items() if given}


def plan_paths(output: str | None, prompt: str, seed: int, images: int) -> Paths:
    """Choose the file names, and make sure now that they can be written."""
    if output is None:
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
        output = f"{words or 'picture'}-{seed}.png"
    path = png_path(output)
    digits = len(str(images))
    singles = [path.with_name(f"{path.stem}-{number:0{digits}}.png") for number in range(1, images + 1)]
    paths = Paths(path, singles if images > 1 else [path])
    for taken in [path, *paths.images]:
        if taken.is_dir():
            raise ValueError(f"{taken}: is a folder; name a file in it")
    return paths


def png_path(output: str) -> Path:
    """The path of a PNG file that can be written. Raises ValueError otherwise."""
    path = Path(os.path.expanduser(output))
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: the name must end in .png (PNG files carry their settings)")
    check_folder(path.parent / "x")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")
    return path


def check_folder(path: Path) -> None:
    """Raise ValueError unless `path` can be made, or is a folder that can be written to."""
    folder = path if path.is_dir() else path.parent
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: exists and is not a folder")
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder to write to")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written to ({error.strerror})") from None


def make_grid(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size -> one picture, in rows that are about as many as the columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, rows * height))
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % columns * width, index // columns * height))
    return grid


def write_png(path: Path, picture: Image.Image, parameters: str) -> None:
    """Write a PNG with its settings."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", parameters) if not parameters.isascii() else text.add_text("parameters", parameters)
    data = io.BytesIO()
    picture.save(data, format="PNG", pnginfo=text)
    write_whole(path, data.getvalue())


def report(written: list[Path], told: dict[str, Any], as_json: bool) -> None:
    """Say what was written: paths, the main one last; or everything as JSON."""
    if as_json:
        print(json.dumps(told))
        return
    for path in written:
        try:
            print(path)
        except UnicodeEncodeError:  # a path is bytes, and need not be text in the terminal's encoding
            click.echo(os.fsencode(path))
