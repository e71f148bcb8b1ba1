"""A picture command at work: its options -> a model and a `Sampling`; the steps -> files and what is said of them."""

import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from click.core import ParameterSource
from PIL import Image
from tqdm import tqdm

from minisd.checkpoint.hub import sha256
from minisd.cli.options import NOT_KEPT, path_and_number, path_and_token
from minisd.cli.output import Paths, check_folder, make_grid, plan_paths, report, write_png
from minisd.cli.words import tell_unknown
from minisd.files import shown
from minisd.metadata.writing import parameters, provenance
from minisd.pipeline import StableDiffusion, to_pictures
from minisd.sampling import FIELDS, Sampling, Step, tell_seed
from minisd.schedulers import DDIMScheduler, named
from minisd.tasks.images import finished, near_size
from minisd.warn import warn

SomeStep = TypeVar("SomeStep", bound=Step)


@dataclass
class Job:
    """The model, what to generate, and where it goes."""

    sd: StableDiffusion
    prompt: str
    sampling: Sampling  # height, width, steps and guidance_scale are numbers here
    seed: int
    options: Mapping[str, Any]  # the command's, as typed
    extra: dict[str, Any]  # the settings that a task adds
    paths: Paths
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def prepare(
        cls, prompt: str, options: Mapping[str, Any], picture: Image.Image | None = None, **extra: Any
    ) -> "Job":
        """Load the model and settle every setting; everything is checked before anything is written.

        The size is the one asked for, or that of `picture`, or the model's. Each image has a seed of its own: seed,
        seed + 1, ...
        """
        started, given = time.perf_counter(), options.get("seed")
        seed = given if given is not None else secrets.randbelow(2**32) if "seed" in options else 0
        images = options.get("images_per_prompt", 1)
        paths = plan_paths(options["output"], prompt, seed, extra.get("frames", images))
        if options.get("steps_dir") is not None:
            check_folder(Path(options["steps_dir"]))
        if options.get("eta") and options["scheduler"] != "ddim":  # a person would wonder; programs pass it along
            raise ValueError("eta is an option of ddim; ddpm is always as random as eta 1, others have theirs")
        sampling = Sampling(**{name: value for name, value in options.items() if name in FIELDS - {"seed"}})
        check_eta(sampling)
        sd = load(options)
        extra |= {"long_prompts": True} if sampling.long_prompts else {}
        extra |= load_adapters(sd, options["loras"], options["embeddings"])
        size = options["size"]
        height, width = reversed(size) if size else near_size(sd, picture) if picture else (None, None)
        _, *latent_size = sd.latent_shape(height, width)
        height, width = (side * sd.vae.config.downsampling for side in latent_size)
        tell_size(sd, size)
        tell_scheduler(sd, options.get("scheduler"))
        if not options["loras"] and not options["embeddings"]:  # they may have brought words
            tell_unknown(options["model"], [prompt, options["negative_prompt"], extra.get("new_prompt", "")])
        steps, scale = sampling.steps_and_scale(sd.generation)
        for last in {seed, seed + images - 1}:
            tell_seed(last)
        generators = [torch.Generator().manual_seed(seed + offset) for offset in range(images)]
        sampling = replace(
            sampling, steps=steps, guidance_scale=scale, height=height, width=width, generator=generators
        )
        return cls(sd, prompt, sampling, seed, options, extra, paths, started)

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `sampling` by name, as the tasks take them."""
        return {name: getattr(self.sampling, name) for name in FIELDS - {"latents", "start"}}

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        assert self.sampling.height is not None and self.sampling.width is not None
        return self.sampling.height, self.sampling.width

    @property
    def steps(self) -> int:
        assert self.sampling.steps is not None
        return self.sampling.steps

    def told(self) -> dict[str, Any]:
        """All that makes a picture, under the names that JSON has had from the beginning."""
        names = ("steps", "guidance_rescale", "eta", "clip_skip", "width", "height")
        settings = {name: getattr(self.sampling, name) for name in names}
        own = {"prompt": self.prompt, "negative": self.sampling.negative_prompt, "seed": self.seed}
        kept = {"scheduler": self.options.get("scheduler", "ddim"), "model": self.options["model"]}
        return {**own, **settings, "guidance": self.sampling.guidance_scale, **kept}

    def record(self) -> dict[str, Any]:
        """The command with every setting settled: what `minisd replay` runs, and the sha256 of the files it reads."""
        context = click.get_current_context()
        given = {name: value for name, value in context.params.items() if name not in NOT_KEPT}
        texts = [text for value in given.values() for text in (value if isinstance(value, tuple | list) else [value])]
        paths = {path_and_number(text)[0] for text in texts if isinstance(text, str)}
        files = {path: sha256(Path(path)) for path in sorted(paths) if os.path.isfile(path)}
        settled: dict[str, Any] = {"seed": self.seed} if "seed" in self.options else {}
        settled |= {
            "steps": self.steps,
            "guidance_scale": self.sampling.guidance_scale,
            "size": f"{self.size[1]}x{self.size[0]}",
        }
        return {"call": context.info_name, "options": given | settled, "files": files, **provenance(self.sd)}

    def progress(self, steps: Iterable[SomeStep], total: int | None = None) -> Iterator[SomeStep]:
        """The same steps, under a progress bar."""
        hidden = True if self.options["quiet"] else None
        yield from tqdm(steps, total=self.steps if total is None else total, unit="step", leave=False, disable=hidden)

    def batches(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The settings of each batch, and the index of its first image. Each image keeps its own generator."""
        settings, images = self.settings, self.sampling.images_per_prompt
        size = self.options.get("batch") or images
        for first in range(0, images, size):
            generators = settings["generator"][first : first + size]
            yield first, {**settings, "generator": generators, "images_per_prompt": len(generators)}

    def run(self, denoise: Callable[..., Iterable[Step]], steps: int | None = None) -> list[Image.Image]:
        """Run the sampling loop `denoise`(**settings), of `steps` steps, for each batch."""
        pictures: list[Image.Image] = []
        for first, settings in self.batches():
            name = f"image-{first + 1:03}-" if self.options.get("batch") else ""
            pictures += self.run_batch(denoise(**settings), steps, name)
        return pictures

    @torch.no_grad()
    def run_batch(self, denoising: Iterable[Step], steps: int | None, name: str) -> list[Image.Image]:
        """Run one loop under a progress bar, and decode the last latents. Previews are named `name`step-..."""
        folder = self.options.get("steps_dir")
        for step in self.progress(denoising, steps):
            if folder is not None:
                Path(folder).mkdir(exist_ok=True)
                predicted = make_grid(to_pictures(self.sd.decode(step.x0)))
                path = Path(folder, f"{name}step-{step.index + 1:03}-t{step.timestep:03}.png")
                write_png(path, predicted, parameters(self.told(), self.extra, self.seed))
        return finished(denoising, to_pictures(self.sd.decode(step.latents)))

    def write(
        self,
        pictures: list[Image.Image],
        together: Callable[[list[Image.Image]], Image.Image] = make_grid,
        last: Path | None = None,
        **found: Any,
    ) -> None:
        """Write the pictures, and all of them in one (a grid), and say so.

        `last`: a file that is written already, to be named last; `found`: what else JSON should tell.
        """
        told, paths, record = self.told(), self.paths, self.record()
        if "seed" in self.options and self.options["seed"] is None:
            print(f"seed {self.seed}", file=sys.stderr)  # nobody gave one
        for offset, (path, picture) in enumerate(zip(paths.images, pictures, strict=True)):
            write_png(path, picture, parameters(told, self.extra, self.seed + offset), {**record, "index": offset})
        if paths.grid:
            text = parameters(told, self.extra, self.seed)
            write_png(paths.grid, together(pictures), text, {**record, "index": "grid"})
        files = {"images": [str(path) for path in paths.images], "grid": str(paths.grid) if paths.grid else None}
        written = [*paths.images, *([paths.grid] if paths.grid else []), *([last] if last else [])]
        seconds = {"seconds": round(time.perf_counter() - self.started, 2)}
        report(written, files | told | self.extra | found | seconds, self.options["as_json"])


def sampling_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are fields of `Sampling`, --size as width and height."""
    width, height = options["size"] or (None, None)
    return {name: value for name, value in options.items() if name in FIELDS} | {"width": width, "height": height}


def tell_size(sd: StableDiffusion, size: tuple[int, int] | None) -> None:
    """Warn of a size, width and height, that the model was not made for."""
    height, width = (side * sd.vae.config.downsampling for side in sd.unet.config.own_size)
    if size and not 0.5 < math.sqrt(width * height / max(1, size[0] * size[1])) < 2:
        warn(
            f"--size {size[0]}x{size[1]}: the model was made for {width}x{height}; far from it, images lose their form"
        )


def tell_scheduler(sd: StableDiffusion, scheduler: str | None) -> None:
    """Warn, where nobody chose the scheduler, that the model's folder names another."""
    context, own = click.get_current_context(silent=True), sd.scheduler_config.get("_class_name")
    chosen = context is None or context.get_parameter_source("scheduler") is not ParameterSource.DEFAULT
    if scheduler == "ddim" and not chosen and own not in (None, "DDIMScheduler"):
        warn(f"the model's own scheduler is {shown(own)}; ddim is used (--scheduler model takes its own)")


def check_eta(sampling: Sampling) -> None:
    """Raise ValueError for an eta that the scheduler would ignore."""
    name = sampling.scheduler
    if sampling.eta and isinstance(name, str) and name != "model" and named(name)[0] is not DDIMScheduler:
        raise ValueError("eta is an option of ddim; ddpm is always as random as eta 1, others have theirs")


def load(options: Mapping[str, Any]) -> StableDiffusion:
    """Load the model, as the options say."""
    device, dtype = choose_device_and_dtype(options)
    given = {name: options[name] for name in ("weights", "vae", "tokenizer", "prediction", "engine")}
    sd = StableDiffusion.load(options["model"], dtype=dtype, device=device, **given)
    sd.tile = options["tile"]
    return sd


def choose_device_and_dtype(options: Mapping[str, Any]) -> tuple[str, torch.dtype]:
    """An accelerator where there is one; float32 on a CPU, float16 elsewhere; unless asked otherwise."""
    device, dtype = options["device"], options["dtype"]
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if dtype == "auto":
        dtype = "float32" if device.startswith("cpu") else "float16"
    return device, getattr(torch, dtype)


def load_adapters(sd: StableDiffusion, loras: tuple[str, ...], embeddings: tuple[str, ...]) -> dict[str, str]:
    """Load PATH[:SCALE] LoRAs and PATH[:TOKEN] embeddings; returns what belongs among a picture's settings."""
    for lora in loras:
        for word in sd.load_lora(*path_and_number(lora)).words:
            print(f"{lora}: has a token for prompts: {word}", file=sys.stderr)
    for embedding in embeddings:
        words = sd.load_embedding(*path_and_token(embedding))
        print(f"{embedding}: in prompts as {', '.join(words)}", file=sys.stderr)
    told = {"lora": loras, "embedding": embeddings}
    return {name: ", ".join(given) for name, given in told.items() if given}
