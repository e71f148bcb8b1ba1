"""Pictures in: files -> PIL images -> tensors -> latents. And out again, with what was lost on the way.

Every task that begins with a picture begins here; `image_to_image.py` is the first.
"""

import math
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minisd.noise import Generators
from minisd.pipeline import StableDiffusion, to_pictures
from minisd.sampling import Step

Pictures = Image.Image | Sequence[Image.Image]


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Any picture file -> RGB; what is transparent becomes white. Raises ValueError for a file that is no picture."""
    try:
        with Image.open(os.path.expanduser(path)) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ValueError(f"{path}: is not a picture that can be read{reason}") from None
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture).convert("RGB")


def as_list(pictures: Pictures) -> list[Image.Image]:
    """One picture or several -> a list. Raises ValueError for anything else, or none."""
    found = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not found or not all(isinstance(picture, Image.Image) for picture in found):
        raise ValueError("image: must be a PIL image, or a list of at least one")
    return found


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


def to_images(pictures: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """PIL images -> (n, 3, H, W) float32 in [-1, 1], resized if need be (Lanczos, as diffusers does)."""
    resized = [picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in resized]) / 255
    return 2 * rearrange(torch.from_numpy(pixels), "n h w c -> n c h w") - 1


@torch.no_grad()
def encode_pictures(sd: StableDiffusion, images: Tensor, count: int, generator: Generators) -> Tensor:
    """Images (n, 3, H, W) -> `count` scaled latents (count, 4, H/8, W/8), each image count / n times in a row.

    Latents are drawn from the VAE's Gaussian, as diffusers does: once for each image, or, given a list of generators,
    for each latent from its own, which makes a batch equal to its members.
    """
    copies, left = divmod(count, len(images))
    if left or not copies:
        raise ValueError(f"image: {len(images)} given; must be one, or one for each prompt")
    images = images.to(sd.device, sd.dtype)
    if not isinstance(generator, Sequence):
        # `cat` keeps the encoder's layout in memory, by which torch chooses kernels, and with them the rounding.
        drawn = sd.vae.encode(images).sample(generator).split(1)
        latents = torch.cat([one for one in drawn for _ in range(copies)])
    elif len(generator) != count:
        raise ValueError(f"generator: {len(generator)} given; must be one, or one for each of {count} pictures")
    else:
        gaussians = [sd.vae.encode(image) for image in images.split(1)]
        latents = torch.cat([gaussians[i // copies].sample(own) for i, own in enumerate(generator)])
    return sd.vae.scaling_factor * latents


@torch.no_grad()
def mean_latents(sd: StableDiffusion, images: Tensor) -> Tensor:
    """Images (n, 3, H, W) -> scaled latents (n, 4, H/8, W/8), nothing drawn: the middle of the VAE's Gaussian."""
    return sd.vae.scaling_factor * sd.vae.encode(images.to(sd.device, sd.dtype)).mode()


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
    """Run the loop to its last step, and decode: finish(sd, image_to_image(sd, "sun", picture)) -> images."""
    *_, last = steps
    return decoded(sd, last.latents)


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB: 20 is a likeness, 30 good, 40 hard to tell apart, infinite the same."""
    difference = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    error = float((difference**2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf
