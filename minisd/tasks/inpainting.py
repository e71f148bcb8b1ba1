"""Inpainting: paint anew what a mask covers, and leave the rest of the picture alone.

In: a picture, a mask (white: paint here), a prompt. Out: the steps of `denoise`. Two ways, chosen by the checkpoint:

    4 channels, any model:         after each step put back what is known, at the noise level of that step
                                   (RePaint without its jumps, Lugmayr et al. 2022, arXiv:2201.09865)
    9 channels, inpainting model:  it sees the mask and the rest of the picture beside the noisy latents
                                   (Rombach et al. 2022, section 4.5)
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.noise import Generators, draw_noise
from minisd.pipeline import StableDiffusion, Step
from minisd.schedulers import Scheduler
from minisd.settings import Texts, list_of_texts, one_source
from minisd.tasks.image_to_image import first_step
from minisd.tasks.images import Pictures, as_list, encode_pictures, fitting_size, to_images


def inpaint(
    sd: StableDiffusion,
    prompt: Texts,
    image: Pictures,
    mask: Pictures,
    *,
    strength: float = 1.0,
    steps: int = 50,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    generator: Generators = None,
    scheduler: Scheduler | str | None = None,
    images_per_prompt: int = 1,
    **settings: Any,
) -> Iterator[Step]:
    """Paint `prompt` where `mask` is white (at least half bright), one `Step` at a time.

    `image` and `mask`: one, or one for each prompt, all of one size. `strength` below 1 begins with the picture's own
    content under the mask; `height`, `width`: the picture's own, unless given. The rest are `denoise`'s settings.

    The same numbers as diffusers' StableDiffusionInpaintPipeline, with two intended exceptions: several prompts times
    several pictures each stay together, where diffusers pairs them crosswise; and given a list of generators each
    picture draws from its own only, where diffusers draws one picture's latents from the first. Raises ValueError for
    a setting that is impossible, and for a checkpoint that can do neither way.
    """
    own_channels, latent_channels = sd.unet.config.in_channels, sd.vae.config.latent_channels
    if own_channels not in (latent_channels, 2 * latent_channels + 1):
        raise ValueError(f"this UNet takes {own_channels} channels: inpainting needs 4, or the 9 of inpainting models")
    sees_mask = own_channels != latent_channels
    pictures, generator = as_list(image), one_source(seed, generator)
    height, width = fitting_size(sd, pictures[0], height, width)
    count = len(list_of_texts("prompt", prompt)) * images_per_prompt
    sampler, start = sd.make_scheduler(scheduler), first_step(steps, strength)
    sampler.set_timesteps(steps, device=sd.device)

    images, pixels = to_images(pictures, height, width), to_mask(as_list(mask), pictures, height, width)
    holes = F.interpolate(pixels, size=sd.latent_size(height, width)).to(sd.device, sd.dtype)  # (n, 1, H/8, W/8)
    holes = holes.repeat_interleave(count // len(holes), dim=0)
    shape = torch.Size((count, latent_channels, *holes.shape[2:]))

    # Three draws, in the order that diffusers makes them: the picture, the noise, the picture without the hole.
    z = encode_pictures(sd, images, count, generator).contiguous() if strength < 1 or not sees_mask else None
    noise = draw_noise(shape, generator, sd.device, sd.dtype)
    # The last is drawn in any case: the noise of later steps depends on how much was drawn before.
    z_outside = encode_pictures(sd, images * (pixels < 0.5), count, generator)

    def predict_noise(x: Tensor, *rest: Any) -> Tensor:
        return sd.predict_noise(torch.cat([x, holes, z_outside], dim=1) if sees_mask else x, *rest)

    for step in sd.denoise(
        prompt,
        latents=noise if strength == 1 or z is None else sampler.add_noise(z, noise, sampler.timesteps[start]),
        start=start,
        steps=steps,
        height=height,
        width=width,
        generator=generator,
        scheduler=sampler,
        images_per_prompt=images_per_prompt,
        predict_noise=predict_noise,
        **settings,
    ):
        if not sees_mask and z is not None:
            last = step.index == len(sampler.timesteps) - 1
            known = z if last else sampler.add_noise(z, noise, sampler.timesteps[step.index + 1])
            step.latents = (1 - holes) * known + holes * step.latents
        yield step


def to_mask(masks: list[Image.Image], pictures: list[Image.Image], height: int, width: int) -> Tensor:
    """Masks -> (n, 1, H, W) float32, 1 where to paint. Raises ValueError for one of another size than the picture."""
    for mask in masks:
        if mask.size != pictures[0].size:
            sizes = [f"{picture.width}x{picture.height}" for picture in (mask, pictures[0])]
            raise ValueError(f"mask: has {sizes[0]} pixels, and the picture {sizes[1]}; must be the same")
    if len(masks) not in (1, len(pictures)):
        raise ValueError(f"mask: {len(masks)} given for {len(pictures)} pictures; give one, or one each")
    grey = [mask.convert("L").resize((width, height), Image.Resampling.LANCZOS) for mask in masks]
    bright = np.stack([np.asarray(mask, dtype=np.float32) for mask in grey]) / 255
    return torch.from_numpy(bright >= 0.5)[:, None].float()
