"""`StableDiffusionImg2ImgPipeline`: diffusers' call over `minisd.tasks.image_to_image`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minisd.diffusers.arguments import check_strength, stacked
from minisd.diffusers.text_to_image import StableDiffusionPipeline
from minisd.noise import Generators, draw_noise
from minisd.tasks.image_to_image import denoise_from


class StableDiffusionImg2ImgPipeline(StableDiffusionPipeline):
    """Picture to picture: noise is added to `image`, and taken away again under `prompt` (Meng et al. 2021, SDEdit)."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
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
        """Generate `prompt` from `image` (see `VaeImageProcessor.preprocess`, or latents): `.images`.

        `strength` from 0 to 1: which part of the steps is taken, and so how much noise there is at first. For the other
        arguments see `Asked`. Raises ValueError for impossible settings and NotCoveredError for unknown ones.
        """
        asked, batch = self._understand(locals())
        state = self._encoded(prompt, asked)
        context = state["prompt_embeds"]
        pixels = self.image_processor.preprocess(image).to(device=self.device, dtype=context.dtype)
        run = self._first_step(num_inference_steps, asked, strength)
        clean = self._clean_latents(pixels, batch, asked.generator)
        noise = draw_noise(clean.shape, asked.generator, self.device, context.dtype)
        sampling = self._sampling(run, clean, asked, state)
        steps = denoise_from(self._core(), context[-batch:], clean, noise, sampling, run.start)
        return self._finish(self._run(steps, run, state, asked), asked)

    def check_inputs(  # type: ignore[override]
        self, prompt: Any, strength: float, callback_steps: int | None = None, *texts: Any, **others: Any
    ) -> None:
        """Raise ValueError for arguments of a call that are impossible; a call does so itself."""
        check_strength(strength)
        super().check_inputs(prompt, *self._own_size(), callback_steps, *texts, **others)

    def _clean_latents(self, pixels: Tensor, batch: int, generator: Generators) -> Tensor:
        """The pictures' latents (B, 4, H/8, W/8), repeated to the batch; what has four channels is that already."""
        if pixels.shape[1] == 4:
            return stacked("image", pixels, batch)
        if isinstance(generator, Sequence):  # each copy is then another sample
            pixels = stacked("image", pixels, batch)
        return stacked("image", self._encode_images(pixels, generator), batch)
