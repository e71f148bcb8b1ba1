"""`DDPMPipeline` and `DDIMPipeline`: from noise to pictures without text, in diffusers' calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from minisd.checkpoint.hub import resolve
from minisd.diffusers.assembly import Parts
from minisd.diffusers.image_processor import VaeImageProcessor
from minisd.diffusers.loading import NEUTRAL, Source, check_variant
from minisd.diffusers.models.unet_2d import UNet2DModel
from minisd.diffusers.outputs import output
from minisd.diffusers.refusing import accept, parameters
from minisd.diffusers.schedulers import DDIMScheduler
from minisd.diffusers.scheduling import folder_scheduler, step_arguments
from minisd.noise import Generators, draw_noise

if TYPE_CHECKING:
    from typing import Self


class PixelPipeline(Parts):
    """A UNet of pixels and a scheduler. Base of the two."""

    _parts: ClassVar[tuple[str, ...]] = ("unet", "scheduler")

    def __init__(self, unet: Any, scheduler: Any) -> None:
        self.unet, self.scheduler = unet, scheduler
        self._progress_bar_config = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Source,
        torch_dtype: Any = None,
        dtype: Any = None,
        variant: str | None = None,
        **others: Any,
    ) -> Self:
        """The pipeline in a folder or hub repository (or "fashion", minisd's small model), float32 unless asked.

        `unet`, `scheduler` replace the folder's. Raises NotCoveredError for other arguments, CheckpointError for files
        that cannot be used.
        """
        call = f"{cls.__name__}.from_pretrained"
        parts = {name: others.pop(name) for name in cls._parts if name in others}
        accept(call, others, NEUTRAL, [*parameters(cls.from_pretrained), *cls._parts])
        check_variant(call, variant)
        folder = resolve(pretrained_model_name_or_path, half=variant == "fp16", component="unet")
        if "unet" not in parts:
            inner = "unet" if (folder / "unet").is_dir() else None  # the first files have no folder for it
            parts["unet"] = UNet2DModel.from_pretrained(folder, inner, torch_dtype, dtype, variant)
        return cls(**{"scheduler": parts.get("scheduler") or folder_scheduler(folder), **parts})

    def _start(self, batch_size: int, generator: Generators) -> Tensor:
        """Noise (B, C, H, W) in the size that the UNet was made for."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator: {len(generator)} given; must be one, or {batch_size}")
        size = self.unet.config.sample_size
        if size is None:
            raise ValueError("unet.config.sample_size is None: this UNet does not say how large its pictures are")
        size = (size, size) if isinstance(size, int) else tuple(size)
        shape = torch.Size((batch_size, self.unet.config.in_channels, *size))
        return draw_noise(shape, generator, self.device, self.dtype)

    def _finish(self, x: Tensor, output_type: str | None, return_dict: bool) -> Any:
        """[-1, 1] -> pictures ("pil"), an array (B, H, W, C) ("np", and whatever else) or a tensor ("pt") in [0, 1]."""
        images: Any = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            images = VaeImageProcessor.numpy_to_pil(images) if output_type == "pil" else images
        return output(return_dict, images=images)

    def _walk(self, x: Tensor, steps: int, given: Mapping[str, Any]) -> Tensor:
        """From noise to pictures in [-1, 1]; `given` are arguments of the scheduler's steps."""
        self.scheduler.set_timesteps(steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            predicted = self.unet(x, t).sample
            x = self.scheduler.step(predicted, t, x, **step_arguments(self.scheduler, **given)).prev_sample
        return x


class DDPMPipeline(PixelPipeline):
    """Sampling with all the noise of the Markov chain (Ho et al. 2020)."""

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate `batch_size` pictures: `.images`."""
        x = self._walk(self._start(batch_size, generator), num_inference_steps, {"generator": generator})
        return self._finish(x, output_type, return_dict)


class DDIMPipeline(PixelPipeline):
    """Sampling in few steps (Song et al. 2021). Any other scheduler is turned into a `DDIMScheduler`."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__(unet, DDIMScheduler.from_config(scheduler.config))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generate `batch_size` pictures: `.images`. `eta`: 0 (no noise in the steps) to 1 (as much as DDPM)."""
        if not 0.0 <= eta <= 1.0:
            warnings.warn(f"eta={eta}: must be from 0 (DDIM) to 1 (DDPM)", stacklevel=2)
        given = {"eta": eta, "use_clipped_model_output": bool(use_clipped_model_output), "generator": generator}
        x = self._walk(self._start(batch_size, generator), num_inference_steps, given)
        return self._finish(x, output_type, return_dict)
