"""Inpainting: generate what a mask covers, and leave the rest of the image alone.

In: an image, a mask (white: generate here), a prompt. Out: the steps of `denoise`. Two ways, chosen by the checkpoint:

    4 channels, any model:         after each step put back what is known, at the noise level of that step
                                   (RePaint without its resampling jumps, Lugmayr et al. 2022, arXiv:2201.09865)
    9 channels, inpainting model:  the UNet's input is latents, mask and the masked image's latents, concatenated along
                                   the channels (Rombach et al. 2022, arXiv:2112.10752, section 4.5)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.noise import draw_noise
from minisd.pipeline import StableDiffusion, to_pictures
from minisd.sampling import Sampling, Step, Texts, list_of_texts
from minisd.tasks.image_to_image import first_step
from minisd.tasks.images import encode_pictures, fitting_size
from minisd.tasks.pictures import Pictures, as_list, as_mask, to_images

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from minisd.sampling import Settings


def inpaint(
    sd: StableDiffusion,
    prompt: Texts,
    image: Pictures,
    mask: Pictures,
    *,
    strength: float = 1.0,
    keep_outside: bool = True,
    mask_grid: str = "any",
    **settings: "Unpack[Settings]",
) -> "Inpainting":
    """Generate `prompt` where `mask` is white (at least half bright), one `Step` at a time.

    `image` and `mask`: one, or one for each prompt, all of one size. What is transparent in a mask is not masked.
    `strength` below 1 begins with the image's own content under the mask. `settings` are those of `denoise`; `height`,
    `width` are the image's own unless given.

    `keep_outside`: `finish` puts the image's own pixels back outside the mask, which the VAE would change a little.
    `mask_grid`: which latents are generated: "any", those of whose 8x8 pixels one is masked, so that thin strokes
    count; "nearest", those whose first pixel is masked, as diffusers does.

    With keep_outside=False and mask_grid="nearest" the same numbers as diffusers' StableDiffusionInpaintPipeline, with
    two intended exceptions: several prompts times several images each stay together, where diffusers pairs them
    crosswise; and given a list of generators each image draws from its own only, where diffusers draws one image's
    latents from the first. Raises ValueError for a setting that is impossible, and for a checkpoint that can do
    neither way.
    """
    sampling, pictures, nine = Sampling(**settings).with_generator(), as_list(image), sees_mask(sd)
    steps, _ = sampling.steps_and_scale(sd.generation)
    start, generator = first_step(steps, strength), sampling.generator
    height, width = fitting_size(sd, pictures[0], sampling.height, sampling.width)
    sampling = replace(sampling, steps=steps, height=height, width=width)
    count = len(list_of_texts("prompt", prompt)) * sampling.images_per_prompt
    channels, *size = sd.latent_shape(height, width)

    images, pixels = to_images(pictures, height, width), to_mask(as_list(mask, "mask"), pictures, height, width)
    holes = on_grid(pixels, size, mask_grid).to(sd.device, sd.dtype)  # (n, 1, H/8, W/8)
    holes = holes.repeat_interleave(count // len(holes), dim=0)

    # Three draws, in the order that diffusers makes them: the image, the noise, the image without the masked part.
    x0 = encode_pictures(sd, images, count, generator).contiguous() if strength < 1 or not nine else None
    noise = draw_noise(torch.Size((count, channels, *size)), generator, sd.device, sd.dtype)
    # The last is drawn in any case: the noise of later steps depends on how much was drawn before.
    outside = encode_pictures(sd, images * (pixels < 0.5), count, generator)
    region = Region(holes, x0, noise, outside)
    loop = denoise_region(sd, prompt, region, sampling, start, noised=strength < 1)
    return Inpainting(loop, images, pixels if keep_outside else None)


@dataclass
class Inpainting(Iterator[Step]):
    """The steps of inpainting, and what is to be done with the pictures after them."""

    steps: Iterator[Step]
    images: Tensor  # (n, 3, H, W) in [-1, 1], the originals
    mask: Tensor | None  # (n, 1, H, W), 1 where to generate; None: nothing is put back

    def __next__(self) -> Step:
        return next(self.steps)

    def finish(self, pictures: list[Image.Image]) -> list[Image.Image]:
        """Decoded pictures, several for each original in a row -> the same with the originals outside the mask.

        Generated pixels fade in from the mask's border inwards, so that there is no seam: outside the mask every pixel
        is the original's.
        """
        if self.mask is None:
            return pictures
        originals, shares = to_pictures(self.images), soft(self.mask)[:, 0, :, :, None].numpy()
        kept = []
        for index, picture in enumerate(pictures):
            original = np.asarray(originals[index * len(originals) // len(pictures)], dtype=np.float32)
            share = shares[index * len(shares) // len(pictures)]
            kept.append(original + share * (np.asarray(picture, dtype=np.float32) - original))
        return [Image.fromarray(pixels.round().astype(np.uint8)) for pixels in kept]


def on_grid(pixels: Tensor, size: Sequence[int], rule: str) -> Tensor:
    """A mask (n, 1, H, W) at the size of the latents: see `inpaint`. Raises ValueError for another rule."""
    if rule == "any":
        return F.adaptive_max_pool2d(pixels, tuple(size))
    if rule == "nearest":
        return F.interpolate(pixels, size=tuple(size))
    raise ValueError(f"mask_grid={rule!r}: must be 'any' or 'nearest'")


def soft(mask: Tensor) -> Tensor:
    """A mask (n, 1, H, W) whose border fades inwards over half a latent: 0 outside, up to 1 inside.

    The mean of the neighbourhood, relative to the largest near by: so that a thin stroke is not faint.
    """
    mean = F.avg_pool2d(mask, kernel_size=9, stride=1, padding=4, count_include_pad=False)
    return mask * mean / F.max_pool2d(mean, kernel_size=9, stride=1, padding=4).clamp(min=1e-6)


@dataclass
class Region:
    """What inpainting knows, as latents. A consumer of the steps may assign other tensors while the loop runs."""

    mask: Tensor  # (B, 1, H/8, W/8), 1 where to generate
    known: Tensor | None  # (B, 4, H/8, W/8), the image, scaled; may be None for nine channels from pure noise
    noise: Tensor  # (B, 4, H/8, W/8), of unit variance
    outside: Tensor  # (B, 4, H/8, W/8), the image without its masked part, scaled; for nine channels


def denoise_region(
    sd: StableDiffusion, prompt: Texts, region: Region, sampling: Sampling, start: int, *, noised: bool
) -> Iterator[Step]:
    """The steps of inpainting a `region` from step `start` on: from the `noised` image, or else from pure noise."""
    nine, predict = sees_mask(sd), sampling.predict_noise or sd.predict_noise
    scheduler = sd.make_scheduler(sampling.scheduler, sampling.steps)

    def predict_noise(x: Tensor, *rest: Any) -> Tensor:
        return predict(torch.cat([x, region.mask, region.outside], dim=1) if nine else x, *rest)

    if noised:
        assert region.known is not None
        begin = start * scheduler.order
        scheduler.set_begin_index(begin)
        x = scheduler.add_noise(region.known, region.noise, scheduler.timesteps[begin])
    else:
        x = region.noise * scheduler.init_noise_sigma
    steps = sd.denoise(prompt, sampling, latents=x, start=start, scheduler=scheduler, predict_noise=predict_noise)
    return steps if nine else put_back(steps, region, scheduler)


def put_back(steps: Iterator[Step], region: Region, scheduler: Any) -> Iterator[Step]:
    """After each step, replace what is outside the mask by the image at the noise level of the next step."""
    assert region.known is not None
    for step in steps:
        following = scheduler.timesteps[step.index + 1 : step.index + 2]
        last = len(following) == 0  # there is no noise after the last step
        known = region.known if last else scheduler.add_noise(region.known, region.noise, following[0])
        step.latents = (1 - region.mask) * known + region.mask * step.latents
        yield step


def sees_mask(sd: StableDiffusion) -> bool:
    """Is this UNet one of nine channels, made for inpainting? Raises ValueError for neither way."""
    channels, latent_channels = sd.unet.config.in_channels, sd.vae.config.latent_channels
    if channels not in (latent_channels, 2 * latent_channels + 1):
        raise ValueError(f"this UNet takes {channels} channels: inpainting needs 4, or the 9 of inpainting models")
    return channels != latent_channels


def to_mask(masks: list[Image.Image], pictures: list[Image.Image], height: int, width: int) -> Tensor:
    """Masks -> (n, 1, H, W) float32, 1 where to generate. Raises ValueError for one of another size than the image."""
    for mask in masks:
        if mask.size != pictures[0].size:
            sizes = [f"{picture.width}x{picture.height}" for picture in (mask, pictures[0])]
            raise ValueError(f"mask: has {sizes[0]} pixels, and the picture {sizes[1]}; must be the same")
    if len(masks) not in (1, len(pictures)):
        raise ValueError(f"mask: {len(masks)} given for {len(pictures)} pictures; give one, or one each")
    grey = [as_mask(mask).resize((width, height), Image.Resampling.LANCZOS) for mask in masks]
    bright = np.stack([np.asarray(mask, dtype=np.float32) for mask in grey]) / 255
    return torch.from_numpy(bright >= 0.5)[:, None].float()
