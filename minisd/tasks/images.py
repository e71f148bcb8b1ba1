"""Images to latents, and latents to pictures, with what was lost on the way.

How pictures come in: `pictures.py`. Every task that begins with one goes on here; `image_to_image.py` is the first.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minisd.noise import Generators
from minisd.pipeline import StableDiffusion, to_pictures
from minisd.sampling import Step
from minisd.warn import check_finite, warn


def fitting_size(
    sd: StableDiffusion, picture: Image.Image, height: int | None = None, width: int | None = None
) -> tuple[int, int]:
    """Height and width in pixels: those asked for, else the picture's, rounded down to what the VAE can make."""
    factor = sd.vae.config.downsampling
    height, width = height or picture.height // factor * factor, width or picture.width // factor * factor
    if not height or not width:
        raise ValueError(f"image: {picture.width}x{picture.height} pixels are too few; give height and width")
    sd.latent_shape(height, width)
    return height, width


def near_size(sd: StableDiffusion, picture: Image.Image) -> tuple[int, int]:
    """Height and width for a picture: its own, or, twice the model's own and more or half of it and less, the model's.

    A UNet generates well near the size that it was trained at only, and the time grows with the fourth power.
    """
    width, height = picture.size
    own_height, own_width = (side * sd.vae.config.downsampling for side in sd.unet.config.own_size)
    share = math.sqrt(own_width * own_height / (width * height))
    if 0.5 < share < 2:
        return fitting_size(sd, picture)
    factor = sd.vae.config.downsampling
    height, width = (max(factor, round(side * share / factor) * factor) for side in (height, width))
    warn(
        f"the picture has {picture.width}x{picture.height} pixels, the model was made for {own_width}x{own_height}: "
        f"it is brought to {width}x{height} (--size {picture.width}x{picture.height} keeps it)"
    )
    return height, width


@torch.no_grad()
def encode_pictures(sd: StableDiffusion, images: Tensor, count: int, generator: Generators) -> Tensor:
    """Images (n, 3, H, W) -> `count` scaled latents (count, 4, H/8, W/8), each image count / n times in a row.

    Latents are drawn from the VAE's Gaussian, as diffusers does: once for each image, or, given a list of generators,
    for each latent from its own, which makes a batch equal to its members.
    """
    copies, left = divmod(count, len(images))
    if left or not copies:
        raise ValueError(f"image: {len(images)} given; must be one, or one for each prompt")
    images = images.to(sd.device, sd.vae_dtype)
    if not isinstance(generator, Sequence):
        # `cat` keeps the encoder's layout in memory, by which torch chooses kernels, and with them the rounding.
        drawn = sd.vae.encode(images).sample(generator).split(1)
        latents = torch.cat([one for one in drawn for _ in range(copies)])
    elif len(generator) != count:
        raise ValueError(f"generator: {len(generator)} given; must be one, or one for each of {count} pictures")
    else:
        gaussians = [sd.vae.encode(image) for image in images.split(1)]
        latents = torch.cat([gaussians[i // copies].sample(own) for i, own in enumerate(generator)])
    check_finite(latents, "latents out of the VAE's encoder")
    return (sd.vae.scaling_factor * latents).to(sd.dtype)


@torch.no_grad()
def mean_latents(sd: StableDiffusion, images: Tensor) -> Tensor:
    """Images (n, 3, H, W) -> scaled latents (n, 4, H/8, W/8), nothing drawn: the middle of the VAE's Gaussian."""
    latents = sd.vae.encode(images.to(sd.device, sd.vae_dtype)).mode()
    check_finite(latents, "latents out of the VAE's encoder")
    return (sd.vae.scaling_factor * latents).to(sd.dtype)


def size_of(sd: StableDiffusion, latents: Tensor) -> tuple[int, int]:
    """The height and width, in pixels, of what latents (B, 4, H/8, W/8) decode to."""
    height, width = (size * sd.vae.config.downsampling for size in latents.shape[2:])
    return height, width


@torch.no_grad()
def decoded(sd: StableDiffusion, latents: Tensor) -> list[Image.Image]:
    """Scaled latents (B, 4, H/8, W/8) -> images."""
    return to_pictures(sd.decode(latents))


@torch.no_grad()
def finish(sd: StableDiffusion, steps: Iterable[Step]) -> list[Image.Image]:
    """Run the loop to its last step, and decode: finish(sd, image_to_image(sd, "sun", picture)) -> images.

    What `inpaint` was told to keep is put back: see `Inpainting.finish`.
    """
    *_, last = steps
    return finished(steps, decoded(sd, last.latents))


def finished(steps: Iterable[Step], pictures: list[Image.Image]) -> list[Image.Image]:
    """The decoded pictures of a task, after what it has to do with them at last."""
    finish: Callable[[list[Image.Image]], list[Image.Image]] | None = getattr(steps, "finish", None)
    return pictures if finish is None else finish(pictures)


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB: 20 is a likeness, 30 good, 40 hard to tell apart, infinite the same."""
    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    error = float((difference**2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf
