"""Interpolation: from one image to another, through images between them.

Noise is interpolated on the sphere (slerp: Shoemake 1985; DDIM, arXiv:2010.02502, appendix D.5), because the mean of
two noises has too little variance; prompts linearly, after the text encoder. Both ends may be seeds, or the noise of
real images (`inversion.py`).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from minisd.context import same_length
from minisd.pipeline import StableDiffusion
from minisd.sampling import Sampling, Step, Texts
from minisd.tasks.images import size_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from minisd.sampling import Settings


def slerp(one: Tensor, other: Tensor, weight: float) -> Tensor:
    """From `one` (weight 0) to `other` (weight 1) at constant angular speed; each (C, H, W) is one vector.

    The length goes from one's to the other's, so that both ends are met exactly.
    """
    a, b = one.double(), other.double()
    dims = tuple(range(1, a.ndim))
    lengths = [x.square().sum(dim=dims, keepdim=True).sqrt() for x in (a, b)]
    a, b = a / lengths[0], b / lengths[1]
    angle = (a * b).sum(dim=dims, keepdim=True).clamp(-1, 1).acos()
    near = angle.sin() < 1e-6  # (nearly) the same direction: the straight line will do
    weights = [torch.where(near, w, (w * angle).sin() / angle.sin()) for w in (1 - weight, weight)]
    length = (1 - weight) * lengths[0] + weight * lengths[1]
    return (length * (weights[0] * a + weights[1] * b)).to(one)


def lerp(one: Tensor, other: Tensor, weight: float) -> Tensor:
    """From `one` (weight 0) to `other` (weight 1) on the straight line."""
    return (1 - weight) * one + weight * other


def interpolate(
    sd: StableDiffusion,
    prompts: tuple[Texts, Texts],
    noises: tuple[Tensor, Tensor],
    *,
    frames: int = 9,
    **settings: "Unpack[Settings]",
) -> Iterator[Step]:
    """Generate `frames` images, at least 2, from prompts[0] and noises[0] (B, 4, H/8, W/8) to prompts[1], noises[1].

    All frames are one batch: each step's latents are (B * frames, ...), interpolation after interpolation. `settings`
    are those of `denoise`. Raises ValueError for a setting that is impossible.
    """
    sampling = Sampling(**settings)
    if frames < 2:
        raise ValueError(f"frames={frames}: must be at least 2, both ends")
    if noises[0].shape != noises[1].shape:
        raise ValueError(f"noises: {tuple(noises[0].shape)} and {tuple(noises[1].shape)}; must have one shape")
    weights = [index / (frames - 1) for index in range(frames)]
    with torch.no_grad():
        skip, long = sampling.clip_skip, sampling.long_prompts
        ends = [sd.encode_prompt(prompt, None, clip_skip=skip, long_prompts=long) for prompt in prompts]
        first, last = same_length(sd, ends)
    latents = torch.stack([slerp(*noises, weight) for weight in weights], dim=1).flatten(0, 1)  # (B * frames, 4, ...)
    context = torch.stack([lerp(first, last, weight) for weight in weights], dim=1).flatten(0, 1)  # (B * frames, 77, D)
    height, width = size_of(sd, latents)
    return sd.denoise(context, sampling, latents=latents, clip_skip=0, height=height, width=width)


def make_strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size, side by side."""
    width, height = pictures[0].size
    strip = Image.new("RGB", (len(pictures) * width, height))
    for index, picture in enumerate(pictures):
        strip.paste(picture, (index * width, 0))
    return strip
