"""START HERE. From a prompt to an image, one walk.

    prompt --tokenizer--> ids --text_encoder--> context ---+
                                                           v
    seed --randn--> latents x_T --[ UNet predicts the noise, scheduler steps to x_{t-1} ]--> x_0 --vae.decode--> image

    sd = StableDiffusion.load("emoji")
    sd.text_to_image("red heart", seed=1)[0].save("heart.png")

Read on in this order: `sampling.py` (every setting), `tokenizer.py`, `text_encoder.py`, `unet.py`, `schedulers/`,
`vae.py`, with `config.py` and `layers.py` beside them; then `model.py`, which loads and saves all of them, and
`checkpoint/keymap.py`: how weight files become modules.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from minisd.context import encode, same_length
from minisd.metadata.writing import sign_all
from minisd.model import LatentDiffusionModel
from minisd.noise import Generators, draw_noise
from minisd.sampling import LoopSettings, Sampling, Step, Texts, check_divisions, matching_prompts, set_steps
from minisd.schedulers import Scheduler, make_scheduler
from minisd.tiling import in_tiles
from minisd.warn import check_finite, watched

if TYPE_CHECKING:
    from typing_extensions import Unpack

TILED_FROM = 1024 * 1024  # pixels of an image


class StableDiffusion(LatentDiffusionModel):
    """A text-to-image latent diffusion model (Rombach et al. 2022, arXiv:2112.10752).

    `text_encoder`, `unet`, `vae` and `tokenizer` are its parts: see `model.py`, which has `load` and `save`.
    """

    tile: bool | None = None  # whether to decode in tiles of the size that the VAE was trained at; None: large images

    @torch.no_grad()
    def text_to_image(
        self, prompt: Texts, sampling: Sampling | None = None, **settings: "Unpack[LoopSettings]"
    ) -> list[Image.Image]:
        """Generate `images_per_prompt` images for each prompt: run `denoise`, which has the settings, then decode.

        The images know their settings, and `save` writes them into PNGs: `minisd show`, `minisd replay`.
        """
        *_, last = self.denoise(prompt, sampling, **settings)
        return sign_all(to_pictures(self.decode(last.latents)), self, prompt, sampling, settings)

    @torch.no_grad()
    def denoise(
        self, prompt: Texts, sampling: Sampling | None = None, **settings: "Unpack[LoopSettings]"
    ) -> Iterator[Step]:
        """The sampling loop: from noise to latents, an iterator over the denoising steps.

        `prompt`: one, several, or context (B, 77, D) that is encoded already. `settings` are the fields of `Sampling`,
        by name (steps=30, seed=1), or in one object, of which those by name replace some. A setting that is impossible
        raises ValueError at this call, before the first step.
        """
        chosen = replace(sampling or Sampling(), **settings)
        steps, scale = chosen.steps_and_scale(self.generation)
        prompts, negatives = matching_prompts(prompt, chosen.negative_prompt)
        scheduler, generator = self.make_scheduler(chosen.scheduler, steps), chosen.make_generator()
        predict_noise = chosen.predict_noise or self.predict_noise
        start = (chosen.start or 0) * scheduler.order  # `timesteps` has one entry for each model call
        if start:
            scheduler.set_begin_index(start)
        check_divisions(scheduler, chosen.eta, start)

        shape = (len(prompts) * chosen.images_per_prompt, *self.latent_shape(chosen.height, chosen.width))
        x = self.initial_noise(shape, generator, chosen.latents)  # (B, 4, H/8, W/8)
        if chosen.start is None:  # unit variance -> that of the first timestep; with `start`, latents are there already
            x = x * scheduler.init_noise_sigma
        unconditional = negatives if scale > 1 else None
        copies, skip = chosen.images_per_prompt, chosen.clip_skip
        context = self.encode_prompt(prompts, unconditional, copies, skip, chosen.long_prompts)

        @torch.no_grad()
        def loop(x: Tensor) -> Iterator[Step]:
            timesteps = scheduler.timesteps[start:]  # on the CPU, where no accelerator waits for them to be read
            for index, (t, on_device) in enumerate(zip(timesteps, timesteps.to(self.device), strict=True), start):
                scaled = scheduler.scale_model_input(x, t)
                eps = predict_noise(scaled, on_device, context, scale, chosen.guidance_rescale)
                result = scheduler.step(eps, t, x, eta=chosen.eta, generator=generator)
                step = Step(index, int(t), result.prev_sample, result.pred_original_sample)
                yield step
                x = step.latents

        return watched(loop(x))

    def encode_prompt(
        self,
        prompts: Texts,
        negatives: Texts | None,
        images_per_prompt: int = 1,
        clip_skip: int = 0,
        long_prompts: bool = False,
    ) -> Tensor:
        """Prompts -> context (B, 77, D), or (2B, 77, D) with `negatives` first: the batch of classifier-free guidance.

        Each prompt is repeated `images_per_prompt` times in a row. As in diffusers, `clip_skip` is not for negatives.
        What is context already stays as it is. `long_prompts`: (B, 77 n, D), see `context.py`.
        """
        contexts = [encode(self, prompts, clip_skip, long_prompts)]
        if negatives is not None:
            contexts.insert(0, encode(self, negatives, 0, long_prompts))
        contexts = same_length(self, contexts)
        return torch.cat([context.repeat_interleave(images_per_prompt, dim=0) for context in contexts])

    def predict_noise(
        self, x: Tensor, t: Tensor, context: Tensor, guidance_scale: float, guidance_rescale: float = 0.0
    ) -> Tensor:
        """The UNet's noise prediction (or v); for guidance the unconditional and the conditional half in one batch."""
        check_channels(self, x)
        if guidance_scale <= 1:
            return self.unet(x, t, context)
        negative, positive = self.unet(torch.cat([x, x]), t, context).chunk(2)
        return guide(negative, positive, guidance_scale, guidance_rescale)

    def explain(self, prompt: str, **settings: Any) -> Any:
        """One generation from the inside, which a notebook shows, and `save` writes as a page: `minisd.explain`."""
        return import_module("minisd.explain").explain(self, prompt, **settings)  # it stands on this file

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, H/8, W/8), as in the loop -> images (B, 3, H, W), about in [-1, 1].

        In tiles (`tiling.py`) where `tile` is True, or where it is None and images have more than `TILED_FROM` pixels.
        """
        latents, config = latents / self.vae.scaling_factor, self.vae.config
        large = latents.shape[2] * latents.shape[3] * config.downsampling**2 > TILED_FROM
        if not (large if self.tile is None else self.tile):
            return self.vae.decode(latents)
        return in_tiles(self.vae.decode, latents, config.sample_size // config.downsampling, config.sample_size)

    def make_scheduler(self, scheduler: Scheduler | str | None, steps: int | None = None) -> Any:
        """A scheduler by name, with the model's noise schedule, or the object given; its timesteps set to `steps`."""
        made = make_scheduler(scheduler, self.scheduler_config)
        if steps is not None:
            set_steps(made, steps)
        return made

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Pixels -> (C, H/8, W/8); the size the UNet was trained at by default. ValueError for one the VAE lacks."""
        factor = self.vae.config.downsampling
        default = self.unet.config.sample_size * factor
        height, width = (default if size is None else size for size in (height, width))
        for name, size in (("height", height), ("width", width)):
            if not isinstance(size, int) or size <= 0 or size % factor:
                raise ValueError(f"{name}={size}: must be a positive multiple of {factor}")
        return self.vae.config.latent_channels, height // factor, width // factor

    def initial_noise(self, shape: tuple[int, ...], generator: Generators, latents: Tensor | None) -> Tensor:
        """x_T: standard normal, drawn on the CPU in the model's dtype, unless `latents` are given."""
        if latents is None:
            device = torch.device("cpu") if generator is None else self.device
            return draw_noise(torch.Size(shape), generator, device, self.dtype).to(self.device)
        if latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}: must be {shape}")
        return latents.to(self.device)


def check_channels(sd: StableDiffusion, x: Tensor) -> None:
    """Raise ValueError for latents (B, C, H, W) of other channels than the UNet takes."""
    if x.shape[1] != sd.unet.config.in_channels:
        raise ValueError(
            f"this UNet takes {sd.unet.config.in_channels} channels, not {x.shape[1]} (an inpainting model?): "
            "it cannot make a picture from text alone"
        )


def guide(negative: Tensor, positive: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): from the unconditional (or negative) prediction
    towards the conditional one, and beyond it.
    """
    eps = negative + scale * (positive - negative)
    return rescale_guidance(eps, positive, rescale) if rescale > 0 else eps


def rescale_guidance(eps: Tensor, positive: Tensor, amount: float) -> Tensor:
    """Scale the guided prediction back to the standard deviation of the conditional one, by `amount` from 0 to 1.

    Strong guidance inflates it, and the image is overexposed (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    """
    dims = tuple(range(1, eps.ndim))
    wanted, found = (one.std(dim=dims, keepdim=True) for one in (positive, eps))
    rescaled = eps * torch.where(found > 0, wanted / found, 1)  # a flat prediction is flat at any scale
    return amount * rescaled + (1 - amount) * eps


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1], or grey (B, 1, H, W) -> PIL images; values are rounded to bytes, not truncated.

    NaN becomes black, with a `NonFiniteWarning`.
    """
    if not check_finite(images, "images out of the VAE"):
        images = images.nan_to_num(-1.0)
    pixels = (images / 2 + 0.5).clamp(0, 1)
    array = rearrange(pixels, "b c h w -> b h w c").cpu().float().numpy()
    grey = array.shape[-1] == 1
    return [Image.fromarray(one[..., 0] if grey else one) for one in (array * 255).round().astype("uint8")]
