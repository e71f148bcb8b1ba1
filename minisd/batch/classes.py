"""A model of pixels in the place of a text-to-image model: a prompt is the name of a class."""

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from minisd.checkpoint.hub import resolve
from minisd.files import read_json_object
from minisd.pipeline import to_pictures
from minisd.pixel.pipeline import PixelDiffusion
from minisd.sampling import Sampling, set_steps
from minisd.schedulers import Scheduler


class ClassModel:
    """What `work.py` asks of a model, answered by a `PixelDiffusion`."""

    def __init__(self, model: PixelDiffusion) -> None:
        self.model, self.generation = model, model.generation
        self.vae = SimpleNamespace(config=SimpleNamespace(downsampling=1))
        self.names: list[str] = list(self.generation.get("classes", map(str, range(model.unet.config.classes or 0))))

    def state(self) -> dict[str, torch.Tensor]:
        return self.model.unet.state_dict()

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """The pictures' channels and size: the model's own. Raises ValueError for another."""
        own = self.model.unet.config.sample_size or (32, 32)
        if (height or own[0], width or own[1]) != tuple(own):
            raise ValueError(f"height={height}, width={width}: this model of pixels makes {own[1]}x{own[0]}")
        return self.model.unet.config.in_channels, *own

    def make_scheduler(self, scheduler: Scheduler | str | None, steps: int) -> Any:
        made = self.model.make_scheduler(scheduler)
        set_steps(made, steps)
        return made

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError for a prompt that is no class."""
        if prompt not in self.names:
            raise ValueError(f"{prompt!r} is no class of this model, which has {', '.join(self.names)}")

    def text_to_image(self, prompts: list[str], sampling: Sampling) -> list[Image.Image]:
        """A picture of each class that is named."""
        labels = [self.names.index(prompt) for prompt in prompts]
        names = ("steps", "guidance_scale", "scheduler", "eta", "generator")
        *_, last = self.model.denoise(labels, **{name: getattr(sampling, name) for name in names})
        return to_pictures(last.latents)


def is_pixels(source: str) -> bool:
    """Whether a model has no text encoder: that of a folder says so."""
    index = resolve(source) / "model_index.json"
    return index.is_file() and "text_encoder" not in read_json_object(index)
