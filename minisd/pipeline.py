"""START HERE. From a prompt to an image, one walk.

    prompt --tokenizer--> ids --text_encoder--> context ---+
                                                           v
    seed --randn--> latents x_T --[ UNet predicts the noise, scheduler steps to x_{t-1} ]--> x_0 --vae.decode--> image

    sd = StableDiffusion.load("emoji")
    sd.text_to_image("red heart", seed=1)[0].save("heart.png")

Read on in this order: `sampling.py` (every setting), `tokenizer.py`, `text_encoder.py`, `unet.py`, `schedulers/`,
`vae.py`, with `config.py` and `layers.py` beside them; then `checkpoint/keymap.py`: how weight files become modules.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from minisd.adapters.loading import Adapters
from minisd.checkpoint.load import build, open_checkpoint, read_tokenizer, usable_device
from minisd.checkpoint.save import Model, save
from minisd.config import ModelConfig
from minisd.context import encode, same_length
from minisd.noise import Generators, draw_noise
from minisd.sampling import LoopSettings, Sampling, Step, Texts, check_divisions, matching_prompts, set_steps
from minisd.schedulers import Scheduler, named
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import CLIPTokenizer
from minisd.unet import UNet
from minisd.vae import VAE
from minisd.warn import check_finite, warn, watched

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from minisd.adapters.lora import LoRA
    from minisd.lab.taps import Taps


class StableDiffusion:
    """A text-to-image latent diffusion model (Rombach et al. 2022, arXiv:2112.10752).

    `text_encoder`, `unet`, `vae` are torch modules, `tokenizer` a callable from strings to ids, `scheduler_config` the
    noise schedule, `generation` the settings that the model's makers recommend (may be empty), `adapters` the LoRAs
    and the added tokens that are loaded on top.
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
        self.text_encoder, self.unet, self.vae, self.tokenizer = text_encoder, unet, vae, tokenizer
        self.scheduler_config, self.generation = dict(scheduler), dict(generation or {})
        self.adapters = Adapters(self)

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
        prediction: str | None = None,
    ) -> "StableDiffusion":
        """Load a model from `source`: "emoji" (comes with minisd), "sd15", a folder in diffusers' layout, a
        `.safetensors` file, or a hub repository id.

        `dtype=None` keeps the file's. `weights`: "auto", "ema" (averaged) or "raw" UNet weights, where a file has both.
        `vae`, `tokenizer`: a path that replaces the model's own. `prediction`: "epsilon", "v_prediction" or "sample",
        where the files do not say what the UNet predicts. Raises FileNotFoundError for a path that is not there,
        `minisd.CheckpointError` for a file that cannot be used.
        """
        device = usable_device(device)
        checkpoint = open_checkpoint(source, dtype=dtype, weights=weights, vae=vae, prediction=prediction)
        for note in checkpoint.notes:
            warn(note)
        parts, own_tokenizer = checkpoint.components, read_tokenizer(checkpoint, tokenizer)
        return cls(
            build(TextEncoder, parts["text_encoder"], dtype, device),
            build(UNet, parts["unet"], dtype, device),
            build(VAE, parts["vae"], dtype, device),
            own_tokenizer,
            scheduler=checkpoint.scheduler,
            generation=checkpoint.generation,
        )

    @torch.no_grad()
    def text_to_image(
        self, prompt: Texts, sampling: Sampling | None = None, **settings: "Unpack[LoopSettings]"
    ) -> list[Image.Image]:
        """Generate `images_per_prompt` images for each prompt: run `denoise`, which has the settings, then decode."""
        *_, last = self.denoise(prompt, sampling, **settings)
        return to_pictures(self.decode(last.latents))

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
            for index, t in enumerate(scheduler.timesteps[start:], start):
                eps = predict_noise(scheduler.scale_model_input(x, t), t, context, scale, chosen.guidance_rescale)
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

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, 4, H/8, W/8), as in the loop -> images (B, 3, H, W), about in [-1, 1]."""
        return self.vae.decode(latents / self.vae.scaling_factor)

    def make_scheduler(self, scheduler: Scheduler | str | None, steps: int | None = None) -> Any:
        """A scheduler by name, with the model's noise schedule, or the object given; its timesteps set to `steps`."""
        made: Any = scheduler
        if scheduler is None or isinstance(scheduler, str):
            own = self.scheduler_config.get("_class_name") if scheduler == "model" else scheduler
            kind, arguments = named(own or "ddim")
            made = kind.from_config(self.scheduler_config, **({} if scheduler == "model" else arguments))
        if steps is not None:
            set_steps(made, steps, self.device)
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

    # ------------------------------------------------ the model as a whole

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    @property
    def config(self) -> ModelConfig:
        """Every number of the architecture and of the noise schedule."""
        text_encoder, unet, vae = self.text_encoder.config, self.unet.config, self.vae.config
        return ModelConfig(text_encoder=text_encoder, unet=unet, vae=vae, scheduler=self.scheduler_config)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def state(self) -> dict[str, Tensor]:
        """Every weight by name, "unet.down.4.attention.cross_attn.q.weight": the model's own memory, to write into."""
        states = {part: module.state_dict() for part, module in self.modules.items()}
        return {f"{part}.{name}": weight for part, state in states.items() for name, weight in state.items()}

    def save(self, path: str | os.PathLike[str], layout: str = "diffusers", dtype: torch.dtype | None = None) -> None:
        """Write the model to `path`: a folder that diffusers loads too, or one file in the "compvis" layout.

        Loaded LoRAs are merged into the weights that are written; added tokens are in the vocabulary. Raises ValueError
        for another layout, FileExistsError where something else than a model is in the way.
        """
        states = self.adapters.merged({name: module.state_dict() for name, module in self.modules.items()})
        save(Model(states, self.config, self.tokenizer, self.generation), path, layout=layout, dtype=dtype)

    # ------------------------------------------------ adapters and taps

    def load_lora(self, path: str | os.PathLike[str], scale: float = 1.0) -> "LoRA":
        """Add a LoRA (Hu et al. 2021, arXiv:2106.09685) beside the weights: see `Adapters.load_lora`."""
        return self.adapters.load_lora(path, scale)

    def unload_lora(self, path: str | os.PathLike[str] | None = None) -> None:
        """Remove the LoRA of this path, or all: the model is as it was, to the last bit."""
        self.adapters.unload_lora(path)

    def load_embedding(self, path: str | os.PathLike[str] | Tensor, token: str | None = None) -> list[str]:
        """Add the tokens of a textual inversion (Gal et al. 2022, arXiv:2208.01618): `Adapters.load_embedding`."""
        return self.adapters.load_embedding(path, token)

    def unload_embedding(self, token: str | None = None) -> None:
        """Remove one added token, or all."""
        self.adapters.unload_embedding(token)

    def taps(self, *patterns: str, **settings: Any) -> "Taps":
        """Read, or edit, any intermediate tensor while the model runs: see `lab/taps.py`."""
        from minisd.lab.taps import Taps

        return Taps(self, *patterns, **settings)


def check_channels(sd: StableDiffusion, x: Tensor) -> None:
    """Raise ValueError for latents (B, C, H, W) of other channels than the UNet takes."""
    if x.shape[1] != sd.unet.config.in_channels:
        raise ValueError(
            f"this UNet takes {sd.unet.config.in_channels} channels, not {x.shape[1]} (an inpainting model?): "
            "it cannot make a picture from text alone"
        )


def guide(negative: Tensor, positive: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): from the unconditional (or negative) prediction
    towards the conditional one, and beyond it."""
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
    """Images (B, 3, H, W) in [-1, 1] -> PIL images; values are rounded to bytes, not truncated.

    NaN becomes black, with a `NonFiniteWarning`.
    """
    if not check_finite(images, "images out of the VAE"):
        images = images.nan_to_num(-1.0)
    pixels = (images / 2 + 0.5).clamp(0, 1)
    array = rearrange(pixels, "b c h w -> b h w c").cpu().float().numpy()
    return [Image.fromarray(picture) for picture in (array * 255).round().astype("uint8")]
