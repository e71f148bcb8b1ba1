"""What the studio's page does, without the page: one model at a time, pictures in and files out.

In: what a visitor typed, drew or uploaded. Out: previews, and files in the studio's own folder. Everything that cannot
be done is a ValueError with one sentence, which the page shows.
"""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

from minisd.explain import explain
from minisd.lab.weights import diff, report
from minisd.lab.weights.inspect import inspect
from minisd.metadata.reading import Found, read_settings
from minisd.metadata.writing import sign_all
from minisd.pipeline import StableDiffusion, to_pictures
from minisd.sampling import Step
from minisd.tasks.image_to_image import image_to_image
from minisd.tasks.images import finished, mean_latents, near_size, psnr
from minisd.tasks.inpainting import inpaint
from minisd.tasks.pictures import as_picture as as_picture
from minisd.tasks.pictures import to_images
from minisd.tasks.prompt_to_prompt import prompt_to_prompt

MOST_PIXELS = 16_000_000  # of an uploaded picture, 4000 x 4000
MOST_STEPS, MOST_SIDE, MOST_GUIDANCE = 150, 1024, 50  # what one visitor may ask for
PREVIEW = 32  # latents a side, at most, that are decoded while a picture is being made
Running = Iterator[Step]


@dataclass
class Frame:
    """How far the work is: a picture to look at, what is said of it, and at the end its file, with its settings."""

    picture: Image.Image
    said: str
    path: str | None = None
    settings: dict[str, Any] | None = None  # all that it was made with, the seed too


class Bench:
    """The one model that is loaded, the models that are offered, and the folder for files. One caller at a time."""

    def __init__(self, models: list[str], folder: Path, allow_paths: bool) -> None:
        self.models, self.folder, self.allow_paths = models, folder, allow_paths
        self.loaded = ""
        self.sd: StableDiffusion | None = None

    def model(self, name: str, lora: str | None = None, scale: float = 1.0) -> StableDiffusion:
        """The model of this name, with a LoRA at this scale. Raises ValueError for a path, unless paths are allowed."""
        self.check_offered(name)
        if self.sd is None or self.loaded != name:
            self.sd = None  # before the next one is loaded: two may not fit into the memory
            self.sd, self.loaded = StableDiffusion.load(name), name
        self.sd.unload_lora()
        if lora:
            self.sd.load_lora(lora, scale)
        return self.sd

    def check_offered(self, name: str) -> None:
        if name not in self.models and not self.allow_paths:
            raise ValueError(
                f"{name!r} is not offered; `minisd studio --allow-paths` lets visitors name files and hub ids"
            )

    def generate(
        self, model: str, prompt: str, settings: dict[str, Any], lora: str | None, scale: float
    ) -> Iterator[Frame]:
        """Text to image."""

        def begin(sd: StableDiffusion, chosen: dict[str, Any]) -> Running:
            return sd.denoise(prompt, **chosen)

        return self.run(model, prompt, settings, begin, (lora, scale), replayable=True)

    def image_to_image(
        self, model: str, prompt: str, settings: dict[str, Any], picture: Image.Image, strength: float
    ) -> Iterator[Frame]:
        """SDEdit: noise the picture, and denoise from there."""

        def begin(sd: StableDiffusion, chosen: dict[str, Any]) -> Running:
            return image_to_image(sd, prompt, picture, strength=strength, **sized(sd, picture, chosen))

        return self.run(model, prompt, settings, begin)

    def inpaint(
        self,
        model: str,
        prompt: str,
        settings: dict[str, Any],
        picture: Image.Image,
        mask: Image.Image,
        strength: float,
    ) -> Iterator[Frame]:
        """Generate where the mask is white."""
        if not mask.getbbox():
            raise ValueError("no mask: draw on the picture where something new is to be")

        def begin(sd: StableDiffusion, chosen: dict[str, Any]) -> Running:
            return inpaint(sd, prompt, picture, mask, strength=strength, **sized(sd, picture, chosen))

        return self.run(model, prompt, settings, begin)

    def rewrite(
        self, model: str, prompt: str, new_prompt: str, settings: dict[str, Any], picture: Image.Image
    ) -> Iterator[Frame]:
        """Exact inversion, then prompt-to-prompt; says how near the picture that comes back is to the one given."""
        size: list[int] = []

        def begin(sd: StableDiffusion, chosen: dict[str, Any]) -> Running:
            place = sized(sd, picture, chosen)
            size[:] = place["width"], place["height"]
            latents = mean_latents(sd, to_images([picture], place["height"], place["width"]))
            return prompt_to_prompt(
                sd, prompt, new_prompt, latents=latents, **{**chosen, "width": None, "height": None}
            )

        for frame in self.run(model, new_prompt, settings, begin):
            if frame.path is not None:
                back = to_pictures(self.model(model).decode(self.last.latents[:1]))[0]
                frame.said += (
                    f"; without the change it comes back with {psnr(back, as_picture(picture).resize(size)):.1f} dB"
                )
            yield frame

    def run(
        self,
        model: str,
        prompt: str,
        settings: dict[str, Any],
        begin: Callable[[StableDiffusion, dict[str, Any]], Running],
        lora: tuple[str | None, float] = (None, 1.0),
        replayable: bool = False,
    ) -> Iterator[Frame]:
        """A frame for each step of the loop that `begin` begins, and one for the finished picture."""
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what to generate")
        chosen = checked(settings)
        sd = self.model(model, *lora)
        running = begin(sd, chosen)
        for step in running:
            self.last = step
            yield Frame(preview(sd, step.x0[-1:]), f"step {step.index + 1} of {chosen['steps']}")
        made = finished(running, to_pictures(sd.decode(self.last.latents[-1:])))
        (picture,) = sign_all(made, sd, prompt, None, chosen)
        path = self.folder / f"{secrets.token_hex(8)}.png"
        if not replayable:
            del picture.info["minisd"]  # the record of a call of `text_to_image`, which this is not
        picture.save(path)
        yield Frame(picture, f"seed {chosen['seed']}", str(path), {**chosen, "prompt": prompt})

    def explain(self, model: str, prompt: str, settings: dict[str, Any]) -> str:
        """The explain page of these settings, to be shown in a frame."""
        return explain(self.model(model), prompt, **checked(settings))._repr_html_()

    def inspect(self, model: str) -> str:
        """What is in a model's files."""
        self.check_offered(model)
        found = inspect(self.place(model))
        return "\n".join([*report.lines(found), *report.tree(found, 0)])

    def diff(self, one: str, other: str) -> str:
        """What differs between two models."""
        for model in (one, other):
            self.check_offered(model)
        return "\n".join(diff.lines(diff.compare(self.place(one), self.place(other), advance=lambda _: None)))

    def place(self, model: str) -> Path:
        from minisd.checkpoint.hub import resolve

        return resolve(model)

    def replay(self, path: str) -> tuple[Image.Image, str]:
        """A picture of the studio, or of Python's `text_to_image`, made again; and whether it is equal to the bit."""
        found, old = read_settings(path), opened(path)
        settings, record = found.settings, found.record or {"call": "generate", "index": 0}
        if record["call"] not in ("generate", "text_to_image") or record["index"] != 0:
            raise ValueError(
                f"it was made by `minisd {record['call']}`, one of several perhaps: `minisd replay` makes it again"
            )
        model, prompt = str(settings.get("model", "")), str(settings["prompt"])
        *_, frame = self.generate(model if model in self.models else self.models[0], prompt, settings, None, 1.0)
        equal = frame.picture.tobytes() == old.tobytes()
        lost = "".join(f"; {line}" for line in found.lost)
        return frame.picture, ("equal to the bit" if equal else f"not equal{distance(old, frame.picture)}") + lost


SETTINGS = ("negative_prompt", "guidance_scale", "steps", "seed", "scheduler", "width", "height")


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings within what one visitor may ask for, with a seed. Raises ValueError."""
    chosen = {
        name: value for name, value in settings.items() if name in SETTINGS and value
    }  # a width of 0: the model's
    seed = settings.get("seed", -1)
    chosen["seed"] = secrets.randbelow(2**32) if seed is None or seed < 0 else int(seed)
    for name, most in {
        "steps": MOST_STEPS,
        "width": MOST_SIDE,
        "height": MOST_SIDE,
        "guidance_scale": MOST_GUIDANCE,
    }.items():
        if chosen.get(name, 0) > most:
            raise ValueError(f"{name}={chosen[name]}: the studio takes at most {most}")
        if name in chosen and name != "guidance_scale":
            chosen[name] = int(chosen[name])
    return chosen


def sized(sd: StableDiffusion, picture: Image.Image, chosen: dict[str, Any]) -> dict[str, Any]:
    """The settings with the size of a picture, or near the model's own where that is far away."""
    height, width = near_size(sd, picture)
    return {**chosen, "height": height, "width": width}


def preview(sd: StableDiffusion, x0: Tensor) -> Image.Image:
    """The predicted picture; latents that are large are averaged first, so that looking takes less than a step."""
    factor = -(-max(x0.shape[-2:]) // PREVIEW)
    small = F.avg_pool2d(x0.float(), factor).to(x0) if factor > 1 else x0
    picture = to_pictures(sd.decode(small))[0]
    return picture.resize((picture.width * factor, picture.height * factor)) if factor > 1 else picture


def distance(old: Image.Image, new: Image.Image) -> str:
    return f": {psnr(old, new):.1f} dB" if old.size == new.size else ": another size"


def opened(path: str) -> Image.Image:
    """An uploaded picture. Raises ValueError for one that is none, or has too many pixels, before it is unpacked."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise ValueError(
                    f"the picture has {file.width}x{file.height} pixels; at most {MOST_PIXELS:,} are taken"
                )
            return as_picture(file)
    except (OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError("this is not a picture that can be read") from None


def painted(layers: list[Image.Image]) -> Image.Image:
    """What was drawn on a picture, in any colour -> a mask, white where something was drawn."""
    mask = Image.new("L", layers[0].size) if layers else Image.new("L", (1, 1))
    for layer in layers:
        mask = ImageChops.lighter(mask, layer.convert("RGBA").getchannel("A").point(lambda level: 255 * (level > 0)))
    return mask


def shown(found: Found) -> dict[str, Any]:
    """A picture's settings for the page."""
    return {"made with": found.program, **found.settings, **({"not honoured here": found.lost} if found.lost else {})}
