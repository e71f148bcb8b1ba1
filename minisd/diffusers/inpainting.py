"""`StableDiffusionInpaintPipeline`: diffusers' call over `minisd.tasks.inpainting`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd.diffusers.arguments import Asked, Run, check_strength, enough, repeated
from minisd.diffusers.image_processor import VaeImageProcessor, check_output_type
from minisd.diffusers.text_to_image import StableDiffusionPipeline
from minisd.noise import Generators, draw_noise
from minisd.sampling import Step
from minisd.tasks.inpainting import Region, denoise_region


class StableDiffusionInpaintPipeline(StableDiffusionPipeline):
    """Painting into a mask, with any UNet (what is outside the mask is put back after each step), or with one of nine
    input channels that was trained for it (it sees the mask and the picture without it: Rombach et al. 2022, 4.5).
    """

    _callback_tensor_inputs = (*StableDiffusionPipeline._callback_tensor_inputs, "mask", "masked_image_latents")
    _corrections: ClassVar[dict[str, Any]] = {"steps_offset": 1, "skip_prk_steps": True}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> Any:
        """Generate `prompt` in `image` where `mask_image` is white (what they may be: `VaeImageProcessor.preprocess`).

        `strength` as for pictures; at 1 only noise is left of what was there. `height`, `width` in pixels: image and
        mask are resized to them (default: the model's own size). `latents` replace the noise, `masked_image_latents`
        those of the picture without the masked part. For the other arguments see `Asked`. Raises ValueError for
        impossible settings and NotCoveredError for unknown ones.
        """
        asked, batch = self._understand(locals())
        own = self._own_size()
        size = height or own[0], width or own[1]
        state, run = self._encoded(prompt, asked), self._first_step(num_inference_steps, asked, strength)
        region = self._region(locals(), asked, size, batch)
        noised = strength < 1 and latents is None
        return self._finish(self._run(self._inside(region, run, state, asked, noised), run, state, asked), asked)

    def _region(self, given: Mapping[str, Any], asked: Asked, size: tuple[int, int], batch: int) -> Region:
        """A call's picture and mask, encoded. Random numbers in diffusers' order: image, noise, masked image."""
        channels, dtype, generator = self.unet.config.in_channels, self.unet.dtype, asked.generator
        if channels not in (4, 9):
            raise ValueError(f"this UNet takes {channels} channels: inpainting takes 4 or 9")
        shape = self._latent_shape(batch, self.vae.config.latent_channels, *size)
        pixels = self.image_processor.preprocess(given["image"], *size).float()
        mask = self.mask_processor.preprocess(given["mask_image"], *size)
        small = enough("mask_image", F.interpolate(mask, size=shape[2:]).to(self.device, dtype), batch)
        clean, latents, visible = None, given["latents"], given["masked_image_latents"]
        if channels == 4 or (given["strength"] < 1 and latents is None):
            clean = repeated("image", self._to_latents(pixels, dtype, generator), batch)
        noise = draw_noise(shape, generator, self.device, dtype) if latents is None else latents.to(self.device)
        visible = pixels * (mask < 0.5) if visible is None else visible
        visible = enough("image", self._to_latents(visible, dtype, generator), batch)
        return Region(small, clean, noise, visible)

    def _inside(self, region: Region, run: Run, state: dict[str, Any], asked: Asked, noised: bool) -> Iterator[Step]:
        """The sampling steps."""
        sampling, context = self._sampling(run, region.noise, asked, state), state["prompt_embeds"]
        prompts = context[-len(region.noise) :]
        steps = denoise_region(self._core(), prompts, region, sampling, run.start, noised=noised)
        return self._shared(steps, region, state)

    def check_inputs(  # type: ignore[override]
        self,
        prompt: Any,
        image: Any,
        mask_image: Any,
        height: int,
        width: int,
        strength: float,
        callback_steps: int | None = None,
        output_type: str = "pil",
        *texts: Any,
        **others: Any,
    ) -> None:
        """Raise ValueError for arguments of a call that are impossible; a call does so itself."""
        check_strength(strength)
        check_output_type(output_type)
        super().check_inputs(prompt, height, width, callback_steps, *texts, **others)

    def _shared(self, steps: Iterator[Step], region: Region, state: dict[str, Any]) -> Iterator[Step]:
        """The same steps; the region's mask and masked image are among what callbacks see, as in the UNet's batch."""
        copies = 2 if self.do_classifier_free_guidance else 1
        state |= {"mask": torch.cat([region.mask] * copies)}
        state |= {"masked_image_latents": torch.cat([region.outside] * copies)}
        for step in steps:
            yield step
            region.mask, region.outside = (state[name].chunk(copies)[0] for name in ("mask", "masked_image_latents"))

    def _to_latents(self, pixels: Tensor, dtype: torch.dtype, generator: Generators) -> Tensor:
        """Pictures -> scaled latents; what has four channels is that already."""
        pixels = pixels.to(device=self.device, dtype=dtype)
        return pixels if pixels.shape[1] == 4 else self._encode_images(pixels, generator)
