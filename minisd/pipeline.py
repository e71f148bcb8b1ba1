"""START HERE. From a prompt to a picture, one walk.

    prompt --tokenizer--> ids --text_encoder--> context ---+
                                                           v
    seed --randn--> latents x_T --[ unet predicts noise, scheduler removes some ]--> x_0 --vae.decode--> picture

    sd = StableDiffusion.load("emoji")
    sd.text_to_image("red heart", seed=1)[0].save("heart.png")

Read on in this order: `tokenizer.py`, `text_encoder.py`, `unet.py`, `schedulers/`, `vae.py`, with `config.py` and
`layers.py` beside them; then `checkpoint/keymap.py` for how weight files become these modules.
"""

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from minisd.adapters.adaptable import Adaptable
from minisd.checkpoint.load import build, open_checkpoint, read_tokenizer, usable_device
from minisd.checkpoint.save import Model, save
from minisd.config import ModelConfig
from minisd.noise import Generators, draw_noise
from minisd.schedulers import DDIMScheduler, DDPMScheduler, Scheduler
from minisd.settings import check_settings, check_start, matching_prompts, one_source
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import CLIPTokenizer
from minisd.unet import UNet
from minisd.vae import VAE

if TYPE_CHECKING:
    from minisd.lab.taps import Taps

SCHEDULERS: dict[str, type[Scheduler]] = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


@dataclass
class Step:
    """One step of the sampling loop. Who reads it may put other `latents` in it: the loop goes on from those."""

    index: int  # 0, 1, 2, ...
    timestep: int  # the timestep that the UNet saw: falling, from about 1000 towards 0
    latents: Tensor  # (B, 4, H/8, W/8), after the step
    x0: Tensor  # (B, 4, H/8, W/8), where the UNet now thinks that this is going: to_pictures(sd.decode(step.x0))


class StableDiffusion(Adaptable):
    """A text-to-image latent diffusion model (Rombach et al. 2022, arXiv:2112.10752), ready to run.

    `text_encoder`, `unet`, `vae` are torch modules, `tokenizer` a callable from strings to ids, `config` every number
    of the architecture, `generation` the settings that the model's makers recommend (may be empty). LoRAs and learnt
    words can be loaded on top: `load_lora`, `load_embedding` (see `adapters/adaptable.py`).
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        unet: UNet,
        vae: VAE,
        tokenizer: CLIPTokenizer,
        *,
        scheduler: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        """`scheduler`: constructor arguments of the noise schedule, under diffusers' names."""
        super().__init__()
        self.text_encoder, self.unet, self.vae, self.tokenizer = text_encoder, unet, vae, tokenizer
        self.config = ModelConfig(
            text_encoder=text_encoder.config, unet=unet.config, vae=vae.config, scheduler=dict(scheduler)
        )
        self.generation = dict(generation or {})

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] = "emoji",
        *,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
        weights: str = "auto",
        vae: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | CLIPTokenizer | None = None,
    ) -> "StableDiffusion":
        """Load a model from `source`: "emoji" (comes with minisd), "sd15", a folder in diffusers' layout, a
        `.safetensors` file, or a hub repository id.

        `dtype=None` keeps the file's. `weights`: "auto", "ema" (averaged) or "raw" UNet weights, where a file has both.
        `vae`, `tokenizer`: a path that replaces the model's own. Raises FileNotFoundError for a path that is not there,
        `minisd.CheckpointError` for a file that cannot be used.
        """
        device = usable_device(device)
        checkpoint = open_checkpoint(source, dtype=dtype, weights=weights, vae=vae)
        for note in checkpoint.notes:
            warnings.warn(note, stacklevel=2)
        words = read_tokenizer(checkpoint, tokenizer)
        parts = checkpoint.components
        return cls(
            build(TextEncoder, parts["text_encoder"], dtype, device),
            build(UNet, parts["unet"], dtype, device),
            build(VAE, parts["vae"], dtype, device),
            words,
            scheduler=checkpoint.scheduler,
            generation=checkpoint.generation,
        )

    @torch.no_grad()
    def text_to_image(self, prompt: str | list[str] | Tensor, **settings: Any) -> list[Image.Image]:
        """Paint `prompt`. Takes the settings of `denoise`; returns `images_per_prompt` pictures for each prompt."""
        latents = None
        for step in self.denoise(prompt, **settings):
            latents = step.latents
        assert latents is not None  # there is at least one step
        return to_pictures(self.decode(latents))

    @torch.no_grad()
    def denoise(
        self,
        prompt: str | list[str] | Tensor,
        *,
        negative_prompt: str | list[str] | Tensor = "",
        steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        scheduler: Scheduler | str | None = None,
        eta: float = 0.0,
        images_per_prompt: int = 1,
        clip_skip: int = 0,
        start: int = 0,
        predict_noise: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] | None = None,
    ) -> Iterator[Step]:
        """The sampling loop: from noise to latents, one `Step` at a time, `steps` in all (more is finer, and slower).

        `guidance_scale` pushes away from `negative_prompt` (one, or one for each prompt) and towards `prompt`; up to 1
        it does not, and `negative_prompt` has no effect. `guidance_rescale` from 0 to 1 is against overexposure.
        `images_per_prompt` pictures are made of each prompt.

        `height`, `width` in pixels, divisible by 8 (default: the model's own). `seed` or `generator` (one, or one for
        each picture) gives all randomness, drawn on the CPU: a seed is the same picture on every device. `latents`
        (B, 4, H/8, W/8) replaces the initial noise. `scheduler`: "ddim" (the default), "ddpm", or an object. `eta`
        from 0 (deterministic) to 1 (as random as DDPM) matters to DDIM only. `clip_skip` leaves out that many last
        layers of the text encoder. Raises ValueError for a setting that is impossible.

        Three openings serve all of `tasks/`: a prompt may be given as context (B, 77, D), already encoded; `start` is
        the index of the first step to take, from `latents` at that step's noise level; and `predict_noise` stands in
        for the method of that name.
        """
        prompts, negatives = matching_prompts(prompt, negative_prompt)
        size = self.latent_size(height, width)
        predict_noise = predict_noise or self.predict_noise
        sampler, generator = self.make_scheduler(scheduler), one_source(seed, generator)
        check_settings(
            steps,
            len(sampler),
            images_per_prompt,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            eta=eta,
        )
        check_start(start, steps, latents)

        guided = guidance_scale > 1
        context = self.encode_prompt(prompts, negatives if guided else None, images_per_prompt, clip_skip)
        sampler.set_timesteps(steps, device=self.device)
        shape = (len(prompts) * images_per_prompt, self.vae.config.latent_channels, *size)
        x = self.initial_noise(shape, generator, latents) * sampler.init_noise_sigma
        takes = inspect.signature(sampler.step).parameters
        extra = {name: value for name, value in {"eta": eta, "generator": generator}.items() if name in takes}

        for index, t in enumerate(sampler.timesteps[start:], start):
            eps = predict_noise(sampler.scale_model_input(x, t), t, context, guidance_scale, guidance_rescale)
            result = sampler.step(eps, t, x, **extra)
            step = Step(index, int(t), result.prev_sample, result.pred_original_sample)
            yield step
            x = step.latents

    # To people and tools, text_to_image has the settings of denoise, one by one.
    text_to_image.__signature__ = inspect.signature(denoise).replace(return_annotation=list[Image.Image])  # type: ignore[attr-defined]

    def encode_prompt(
        self,
        prompts: list[str] | Tensor,
        negatives: list[str] | Tensor | None,
        images_per_prompt: int = 1,
        clip_skip: int = 0,
    ) -> Tensor:
        """Prompts -> context (B, 77, D), or (2B, 77, D) with `negatives` first: the two halves of guidance.

        Each prompt stands `images_per_prompt` times in a row. As in diffusers, `clip_skip` is not for negatives.
        What is context already stays as it is.
        """

        def encode(texts: list[str] | Tensor, clip_skip: int = 0) -> Tensor:
            if isinstance(texts, Tensor):
                return texts.to(self.device).repeat_interleave(images_per_prompt, dim=0)
            context = self.text_encoder(self.tokenizer(texts).to(self.device), clip_skip=clip_skip)
            return context.repeat_interleave(images_per_prompt, dim=0)

        context = encode(prompts, clip_skip)
        return context if negatives is None else torch.cat([encode(negatives), context])

    def predict_noise(
        self, x: Tensor, t: Tensor, context: Tensor, guidance_scale: float, guidance_rescale: float = 0.0
    ) -> Tensor:
        """The UNet's noise, pushed away from the negative prompt and towards the prompt.

        Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): negative + scale (positive - negative).
        """
        if x.shape[1] != self.unet.config.in_channels:
            raise ValueError(
                f"this UNet takes {self.unet.config.in_channels} channels, not {x.shape[1]} (an inpainting model?): "
                "it cannot make a picture from text alone"
            )
        if guidance_scale <= 1:
            return self.unet(x, t, context)
        negative, positive = self.unet(torch.cat([x, x]), t, context).chunk(2)
        eps = negative + guidance_scale * (positive - negative)
        return rescale_guidance(eps, positive, guidance_rescale) if guidance_rescale > 0 else eps

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, H/8, W/8), as in the loop -> images (B, 3, H, W), about in [-1, 1]."""
        return self.vae.decode(latents / self.vae.scaling_factor)

    def save(self, path: str | os.PathLike[str], layout: str = "diffusers", dtype: torch.dtype | None = None) -> None:
        """Write the model to `path`: a folder that diffusers loads too, or one file in the "compvis" layout.

        LoRAs that are loaded are worked into the weights that are written, words of embeddings are in the vocabulary.
        Raises ValueError for another layout, FileExistsError where something else than a model is in the way.
        """
        modules = {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}
        states = self.baked({name: module.state_dict() for name, module in modules.items()})
        save(Model(states, self.config, self.tokenizer, self.generation), path, layout=layout, dtype=dtype)

    def state(self) -> dict[str, Tensor]:
        """Every weight under its prose name, "unet.down.4.attention.cross_attn.q.weight": the model's own memory.

        Who writes into one of these tensors operates on the model: `sd.state()[name][:80] = 0`.
        """
        parts = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return {
            f"{part}.{name}": weight for part, module in parts.items() for name, weight in module.state_dict().items()
        }

    def taps(self, *patterns: str, **settings: Any) -> "Taps":
        """Read, or edit, anything inside while the model works: see `minisd/lab/taps.py`.

        `with sd.taps("unet.*.cross_attn.probabilities", keep=True) as taps: sd.text_to_image(...)`
        """
        from minisd.lab.taps import Taps

        return Taps(self, *patterns, **settings)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Pixels -> latents. Raises ValueError for a size that the VAE cannot make."""
        factor = self.vae.config.downsampling
        default = self.unet.config.sample_size * factor
        height, width = (default if size is None else size for size in (height, width))
        for name, size in (("height", height), ("width", width)):
            if not isinstance(size, int) or size <= 0 or size % factor:
                raise ValueError(f"{name}={size}: must be a positive multiple of {factor}")
        return height // factor, width // factor

    def make_scheduler(self, scheduler: Scheduler | str | None) -> Any:
        """A scheduler by name, with the model's noise schedule; an object is taken as it is."""
        if scheduler is None or isinstance(scheduler, str):
            kind = SCHEDULERS.get(scheduler or "ddim")
            if kind is None:
                raise ValueError(f"scheduler={scheduler!r}: must be one of {', '.join(SCHEDULERS)}")
            return kind.from_config(self.config.scheduler)
        return scheduler

    def initial_noise(self, shape: tuple[int, ...], generator: Generators, latents: Tensor | None) -> Tensor:
        """x_T: standard normal, drawn on the CPU in the model's dtype, unless `latents` are given."""
        if latents is None:
            device = torch.device("cpu") if generator is None else self.device
            return draw_noise(torch.Size(shape), generator, device, self.dtype).to(self.device)
        if latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}: must be {shape}")
        return latents.to(self.device)


def rescale_guidance(eps: Tensor, positive: Tensor, amount: float) -> Tensor:
    """Give guided noise the spread of the text's own prediction again, by `amount` from 0 to 1.

    Strong guidance inflates the noise, and the picture is overexposed (Lin et al. 2023, arXiv:2305.08891, section 3.4).
    """
    dims = tuple(range(1, eps.ndim))
    rescaled = eps * (positive.std(dim=dims, keepdim=True) / eps.std(dim=dims, keepdim=True))
    return amount * rescaled + (1 - amount) * eps


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [-1, 1] -> PIL images; values are rounded to bytes, not cut."""
    pixels = (images / 2 + 0.5).clamp(0, 1)
    array = rearrange(pixels, "b c h w -> b h w c").cpu().float().numpy()
    return [Image.fromarray(picture) for picture in (array * 255).round().astype("uint8")]
