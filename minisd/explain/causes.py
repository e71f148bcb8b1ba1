"""What if: the picture without a word, with another guidance from a step on, without a block of the UNet.

Each is a run of its own from the same noise, in few steps, so that dozens of them take seconds; the picture that they
are compared with is made in as few. In: a `Generation`. Out: pictures and how far they are from it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minisd.explain.generation import Generation, blocks
from minisd.pipeline import guide, to_pictures
from minisd.sampling import Sampling, Step
from minisd.tasks.images import psnr

FEW = 6  # steps of a run with a changed prompt or guidance
FEWER = 4  # of one without a block: there are two dozen of them
WORDS = 6  # at most so many words are left out, one at a time
SMALL = 50_000_000  # parameters of a UNet that can run a whole batch of changes at once
LITTLE = {"a", "an", "the", "and", "of", "on", "in", "with", "at", "to"}


@dataclass
class Change:
    """One thing changed, the picture then, and how far it is from the unchanged one."""

    name: str
    picture: Image.Image
    psnr: float | None  # dB; None for an equal picture


@torch.no_grad()
def few_steps(found: Generation, steps: int, prompts: Sequence[str], **changes: Any) -> Iterator[Step]:
    """A run of few steps for several prompts at once, all from the generation's noise; each has its own generator."""
    steps = min(steps, found.count)
    count = len(prompts)
    changes.setdefault("latents", found.noise)
    latents = changes.pop("latents").expand(count, -1, -1, -1)
    generators = [torch.Generator().manual_seed(found.sampling.seed or 0) for _ in range(count)]
    sampling = replace(found.sampling, steps=steps, seed=None, generator=generators, latents=latents, **changes)
    return found.sd.denoise(list(prompts), sampling)


def last_pictures(found: Generation, steps: Iterator[Step]) -> list[Image.Image]:
    *_, last = steps
    return [picture for one in last.latents.split(1) for picture in to_pictures(found.sd.decode(one))]


def portions(found: Generation, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """All at once for a small UNet, one at a time for a large one, whose activations fill the memory."""
    size = sum(weight.numel() for weight in found.sd.unet.parameters())
    most = len(items) if size < SMALL else 1
    yield from (items[first : first + most] for first in range(0, len(items), most))


def compared(names: Sequence[str], pictures: Sequence[Image.Image], plain: Image.Image) -> list[Change]:
    distances = (psnr(plain, picture) for picture in pictures)
    return [
        Change(name, picture, distance if distance < float("inf") else None)
        for name, picture, distance in zip(names, pictures, distances, strict=True)
    ]


# ---- words -----------------------------------------------------------------------------------------------------


def without_words(found: Generation) -> tuple[Image.Image, list[Change]]:
    """The picture in few steps, and without each word: same seed, same everything."""
    words = found.prompt.split()
    places = [place for place, word in enumerate(words) if word.lower().strip(".,;:!?") not in LITTLE][:WORDS]
    prompts = [found.prompt, *(" ".join(words[:place] + words[place + 1 :]) for place in places)]
    pictures = [
        picture
        for portion in portions(found, prompts)
        for picture in last_pictures(found, few_steps(found, FEW, portion))
    ]
    return pictures[0], compared([words[place] for place in places], pictures[1:], pictures[0])


# ---- guidance --------------------------------------------------------------------------------------------------


def guidance_values(scale: float) -> list[float]:
    """Five values around the one in use."""
    scale = scale if scale > 1 else 4.0
    return [1.0, scale / 2, scale, 2 * scale, 4 * scale]


def other_guidance(found: Generation) -> list[dict[str, Any]]:
    """From a third and from two thirds of few steps on, and from the beginning: the pictures of five guidance scales.

    Each: `share` of the steps that were taken with the usual guidance before, and the pictures.
    """
    steps, values = min(FEW, found.count), guidance_values(found.scale)
    plain = list(few_steps(found, steps, [found.prompt]))
    starts = sorted({0, steps // 3, 2 * steps // 3})
    rows = []
    for start in starts:
        latents = found.noise if start == 0 else plain[start - 1].latents
        pictures: list[Image.Image] = []
        for portion in portions(found, values):
            predict = guided_by(found, torch.tensor(list(portion)))
            changes = {"predict_noise": predict, "latents": latents, "guidance_scale": 2.0}
            changes |= {"start": start} if start else {}
            pictures += last_pictures(found, few_steps(found, steps, [found.prompt] * len(portion), **changes))
        rows.append({"share": start / steps, "pictures": pictures})
    return rows


def guided_by(found: Generation, scales: Tensor) -> Any:
    """`predict_noise` with a guidance scale of its own for each picture of the batch."""

    def predict(x: Tensor, t: Tensor, context: Tensor, _: float, rescale: float) -> Tensor:
        negative, positive = found.sd.unet(torch.cat([x, x]), t, context).chunk(2)
        return guide(negative, positive, scales.to(x)[:, None, None, None], rescale)  # type: ignore[arg-type]

    return predict


# ---- blocks ----------------------------------------------------------------------------------------------------


def without_blocks(found: Generation) -> list[Change]:
    """The picture with what one block adds set to zero, for every block that adds to a residual connection.

    One batch has all of them: picture n goes without block n. In a resnet the second convolution gives nothing then, in
    a transformer the last projection, so that the residual connections alone are left.
    """
    names = [name for name, block in blocks(found.sd).items() if block.resnet is not None]
    steps = min(FEWER, found.count)
    (plain,) = last_pictures(found, few_steps(found, steps, [found.prompt]))
    pictures: list[Image.Image] = []
    for portion in portions(found, names):
        edits = {}
        for place, name in enumerate(portion):
            block, zero = blocks(found.sd)[name], zeroing(place, len(portion))
            edits[f"{name}.resnet.conv2"] = zero
            if block.attention is not None:
                edits[f"{name}.attention.proj_out"] = zero
        with found.sd.taps(edit=edits):
            pictures += last_pictures(found, few_steps(found, steps, [found.prompt] * len(portion)))
    return compared(names, pictures, plain)


def zeroing(place: int, count: int) -> Any:
    """An edit that sets one picture's part of a tensor to zero, in both halves of guidance."""

    def zero(tensor: Tensor, _: Any) -> Tensor:
        tensor[place::count] = 0
        return tensor

    return zero


# ---- comparison ------------------------------------------------------------------------------------------------

APART = 0.05  # of the latents' size: from here on two runs are said to part


def parting(one: Sequence[Step], other: Sequence[Step]) -> tuple[list[float], int | None]:
    """The distance of two runs after each step, relative to the first's size, and the first step beyond `APART`."""
    pairs = zip(one, other, strict=False)
    distances = [
        float((a.latents - b.latents).norm() / a.latents.norm()) if a.latents.shape == b.latents.shape else float("inf")
        for a, b in pairs
    ]
    return distances, next((step for step, distance in enumerate(distances) if distance > APART), None)


def settings_of(sampling: Sampling) -> dict[str, Any]:
    """The settings that a person chose, for the page."""
    names = ("negative_prompt", "seed", "steps", "guidance_scale", "guidance_rescale", "scheduler", "eta")
    return {name: getattr(sampling, name) for name in names if getattr(sampling, name) not in ("", None, 0.0)}
