"""Noise -> pictures, without text and without a VAE: the sampling loop of DDPM and DDIM on pixels.

    model = PixelDiffusion.load("fashion")
    model.sample([0, 7], seed=1)[0].save("shirt.png")

Next: `unet.py`, the network; `files.py`, its folder.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from minisd.checkpoint.hub import GENERATION_CONFIG
from minisd.checkpoint.load import build, usable_device
from minisd.files import read_json_object
from minisd.noise import draw_noise
from minisd.pipeline import guide, to_pictures
from minisd.pixel.files import find_unet, open_unet, save_folder
from minisd.pixel.unet import PixelUNet
from minisd.sampling import Step, set_steps
from minisd.schedulers import Scheduler, make_scheduler
from minisd.warn import warn

if TYPE_CHECKING:
    from typing_extensions import Self

PredictNoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, t, labels) -> noise or v, shaped as x


class PixelDiffusion:
    """A denoising diffusion model of pictures (Ho et al. 2020, arXiv:2006.11239).

    `unet`: the network; `scheduler_config`: the noise schedule; `generation`: recommended settings (may be empty):
    `steps`, `guidance_scale`, `classes` (their names), `unconditional` (the label that stands for no class).
    """

    def __init__(
        self, unet: PixelUNet, *, scheduler: Mapping[str, Any], generation: Mapping[str, Any] | None = None
    ) -> None:
        self.unet, self.scheduler_config, self.generation = unet, dict(scheduler), dict(generation or {})

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] = "fashion",
        *,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "Self":
        """Load a model: "fashion" (comes with minisd), a folder of diffusers' `DDPMPipeline` or `DDIMPipeline`, that of
        a `UNet2DModel` alone (its schedule is then DDPM's own), or a hub repository id.

        `dtype=None` keeps the file's. Raises FileNotFoundError where there is nothing, `minisd.CheckpointError` for
        files that cannot be used.
        """
        device = usable_device(device)
        folder, unet = find_unet(source, half=dtype == torch.float16)
        part = open_unet(unet, half=dtype == torch.float16)
        for note in part.notes:
            warn(note)
        settings = folder / "scheduler" / "scheduler_config.json"
        settings = settings if settings.exists() else folder / "scheduler_config.json"  # the first files' place
        recommended = folder / GENERATION_CONFIG
        return cls(
            build(PixelUNet, part, dtype, device),
            scheduler=read_json_object(settings) if settings.exists() else {"_class_name": "DDPMScheduler"},
            generation=read_json_object(recommended) if recommended.exists() else None,
        )

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write a folder that diffusers loads too. Raises FileExistsError where something else is in the way."""
        scheduler = {"_class_name": "DDPMScheduler", **self.scheduler_config}
        save_folder(path, self.unet.state_dict(), self.unet.config, scheduler, self.generation, dtype)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    def make_scheduler(self, scheduler: Scheduler | str | None = None) -> Any:
        """A scheduler by name, with the model's noise schedule, or the object given. None is DDIM."""
        return make_scheduler(scheduler, self.scheduler_config, own="ddpm")

    @torch.no_grad()
    def sample(self, labels: Sequence[int] | None = None, **settings: Any) -> list[Image.Image]:
        """Generate pictures: run `denoise`, which has the settings."""
        *_, last = self.denoise(labels, **settings)
        return to_pictures(last.latents)

    def denoise(
        self,
        labels: Sequence[int] | None = None,
        *,
        images: int = 1,
        steps: int | None = None,
        guidance_scale: float | None = None,
        scheduler: Scheduler | str | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        size: tuple[int, int] | None = None,
        predict_noise: PredictNoise | None = None,
    ) -> Iterator[Step]:
        """The sampling loop, an iterator over the steps; `latents` of a step are pictures (B, C, H, W) in [-1, 1].

        `labels`: one class a picture, for a model with classes; else `images` says how many. `steps` default to the
        model's, or 50; so `guidance_scale` (else 1, none), which is classifier-free guidance and needs a label for no
        class. `eta` and `use_clipped_model_output` are DDIM's, `size` is (H, W), the model's by default. Raises
        ValueError for settings that do not fit.
        """
        classes = self.check_labels(labels)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        made, predict = self.make_scheduler(scheduler), predict_noise or self.predictor(guidance_scale, labels)
        set_steps(made, steps or self.steps)
        height, width = size or self.unet.config.sample_size or (32, 32)
        count = images if classes is None else len(classes)
        shape = torch.Size((count, self.unet.config.in_channels, height, width))
        extra = {"use_clipped_model_output": True} if use_clipped_model_output else {}

        @torch.no_grad()
        def loop() -> Iterator[Step]:
            x = draw_noise(shape, generator, self.device, self.unet.conv_in.weight.dtype) * made.init_noise_sigma
            for index, (t, on_device) in enumerate(zip(made.timesteps, made.timesteps.to(self.device), strict=True)):
                eps = predict(made.scale_model_input(x, t), on_device, classes)
                result = made.step(eps, t, x, eta=eta, generator=generator, **extra)
                x = result.prev_sample
                yield Step(index, int(t), x, result.pred_original_sample)

        return loop()

    def check_labels(self, labels: Sequence[int] | None) -> Tensor | None:
        """Labels (B,) on the model's device. Raises ValueError where they do not fit the model."""
        count = self.unet.config.classes
        if labels is None and count is not None:
            raise ValueError(f"labels: this model has {count} classes, and needs one a picture, 0 to {count - 1}")
        if labels is None:
            return None
        if count is None:
            raise ValueError("labels: this model has no classes")
        if not labels or not all(isinstance(one, int) and 0 <= one < count for one in labels):
            raise ValueError(f"labels={list(labels)}: must be from 0 to {count - 1}, one a picture")
        return torch.tensor(labels, device=self.device)

    @property
    def steps(self) -> int:
        """How many the model's makers recommend, or 50."""
        return int(self.generation.get("steps", 50))

    def predictor(self, guidance_scale: float | None = None, labels: Sequence[int] | None = None) -> PredictNoise:
        """The UNet, or classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): its prediction for the class,
        moved away from that for no class. Raises ValueError for a scale above 1 without a label for no class.
        """
        none = self.generation.get("unconditional")
        scale = float(self.generation.get("guidance_scale", 1)) if guidance_scale is None else guidance_scale
        if scale <= 1 or labels is None:
            return self.unet
        if none is None:
            raise ValueError(f"guidance_scale={scale}: this model has no label for no class: must be 1")

        def predict(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            assert labels is not None
            both = self.unet(torch.cat([x, x]), t, torch.cat([torch.full_like(labels, none), labels]))
            free, conditional = both.chunk(2)
            return guide(free, conditional, scale)

        return predict
