"""Inversion: from a picture back to the noise that paints it; and editing, which walks down again with other words.

DDIM without randomness is a road that can be walked both ways (Song et al. 2021, arXiv:2010.02502, section 4.3), but a
step down from x asks the UNet at x, and the step back up knows only where that step arrived, D(x). Two ways up:

    plain   ask the UNet at D(x) instead: good without guidance and with many steps, useless with guidance
    exact   solve D(x) = y for x: y + (x - D(x)) has the x looked for as its fixed point (Pan et al. 2023,
            AIDI, arXiv:2309.04907). Guidance makes that iteration diverge now and then, so that it is
            accelerated by the last few tries (Anderson 1965; Walker & Ni 2011, doi:10.1137/10078356X)

The exact way undoes the sampler's own step, whatever that does: guidance, rescale, v-prediction, any spacing. But a
guided step does not reach every y. What the best x misses is kept then, and added on the way down (Ju et al. 2023,
arXiv:2310.01506, do so with plain inversion, where much is missed).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minisd.pipeline import StableDiffusion, Step, to_pictures
from minisd.schedulers import DDIMInverseScheduler, DDIMScheduler, Scheduler
from minisd.settings import Texts, check_settings, check_start, matching_prompts
from minisd.tasks.images import psnr

MOST_TRIES = 25  # of the UNet in a step; about six are usual
REMEMBERED = 5  # tries that Anderson acceleration combines
ROUNDINGS = 8  # an error of so many roundings, relative to the latents' size, is none


@dataclass
class StepUp(Step):
    """A step undone: `latents` are noisier than before."""

    undone: int  # the index of that step on the way down
    miss: Tensor  # (B, 4, H/8, W/8), what a step down from `latents` lacks: rounding, unless there is no such x


def invert(
    sd: StableDiffusion,
    prompt: Texts,
    latents: Tensor,
    *,
    exact: bool = True,
    steps: int = 50,
    start: int = 0,
    negative_prompt: Texts = "",
    images_per_prompt: int = 1,
    clip_skip: int = 0,
    scheduler: Scheduler | str | None = None,
    eta: float = 0.0,
    **settings: Any,
) -> Iterator[StepUp]:
    """Walk up from clean scaled `latents` (B, 4, H/8, W/8), as DDIM came down with the same `prompt` and settings.

    Yields a `StepUp` for each step undone, of `steps`; ends at the latents from which `denoise` goes down again if told
    to begin at `start`: 0 is the noise itself. Raises ValueError for a setting that is impossible.
    """
    sampler = sd.make_scheduler(scheduler)
    if eta or not isinstance(sampler, DDIMScheduler):
        raise ValueError("inversion needs the ddim scheduler with eta 0: what is drawn at random cannot be undone")
    check_settings(steps, len(sampler), images_per_prompt)
    check_start(start, steps, latents)
    prompts, negatives = matching_prompts(prompt, negative_prompt)
    with torch.no_grad():  # encoded once: the exact way asks often
        context = sd.encode_prompt(prompts, None, images_per_prompt, clip_skip)
        unwanted = sd.encode_prompt(negatives, None, images_per_prompt)
    settings |= {"negative_prompt": unwanted, "steps": steps, **size_of(sd, latents)}
    if not exact:
        inverse = DDIMInverseScheduler.from_config(sampler.config)
        for step in sd.denoise(context, latents=latents, scheduler=inverse, **settings):
            yield StepUp(**vars(step), undone=steps - 1 - step.index, miss=torch.zeros_like(latents))
            if step.index == steps - start - 1:
                return

    for index, undone in enumerate(reversed(range(start, steps))):

        def step_down(x: Tensor, undone: int = undone) -> Step:
            return next(sd.denoise(context, latents=x, start=undone, scheduler=sampler, **settings))

        latents, step, miss = solve(step_down, latents)
        yield StepUp(index, step.timestep, latents, step.x0, undone, miss)


@torch.no_grad()
def solve(step_down: Callable[[Tensor], Step], goal: Tensor) -> tuple[Tensor, Step, Tensor]:
    """The x whose step down arrives at `goal` (B, ...), that step, what it misses: the best of all tries.

    Every sample goes its own way: Anderson's least squares are solved for each alone.
    """
    x, best, best_miss, least = goal, goal, goal, torch.full((len(goal),), torch.inf)
    tries: list[Tensor] = []
    misses: list[Tensor] = []
    for _ in range(MOST_TRIES):
        step = step_down(x)
        missing = goal - step.latents
        miss = missing.flatten(1).double().cpu()  # (B, n)
        error = miss.norm(dim=1) / goal.flatten(1).double().cpu().norm(dim=1)
        better = error < least
        here = better.to(x.device)[:, None, None, None]
        best, best_miss = torch.where(here, x, best), torch.where(here, missing, best_miss)
        least = torch.where(better, error, least)
        if least.max() <= ROUNDINGS * torch.finfo(goal.dtype).eps:
            break
        tries = [*tries[-REMEMBERED:], x.flatten(1).double().cpu()]
        misses = [*misses[-REMEMBERED:], miss]
        x = next_try(tries, misses).reshape(goal.shape).to(goal)
    return best, step, best_miss


def next_try(tries: list[Tensor], misses: list[Tensor]) -> Tensor:
    """Anderson acceleration: mix the tries so that their misses (B, n) cancel as well as they can, then go the rest."""
    x, miss = tries[-1], misses[-1]
    if len(tries) == 1:
        return x + miss
    steps = torch.stack(tries).diff(dim=0).permute(1, 2, 0)  # (B, n, m)
    changes = torch.stack(misses).diff(dim=0).permute(1, 2, 0)  # (B, n, m)
    weights = torch.linalg.lstsq(changes, miss[..., None]).solution  # (B, m, 1)
    return x + miss - ((steps + changes) @ weights).squeeze(-1)


def walk_down(sd: StableDiffusion, prompt: Texts, walk: Sequence[StepUp], **settings: Any) -> Iterator[Step]:
    """Down again from where `walk`, the steps of `invert`, ends: `denoise` with what each step missed.

    With the prompt and settings of the way up, the picture comes back; with another prompt, it is edited.
    """
    misses = {step.undone: step.miss for step in walk}
    top = walk[-1]
    settings |= {"latents": top.latents, "start": top.undone, **size_of(sd, top.latents)}
    for step in sd.denoise(prompt, **settings):
        step.latents = step.latents + misses[step.index]
        yield step


@dataclass(frozen=True)
class RoundTrip:
    """A picture walked up to noise and down again, and what was lost."""

    noise: Tensor  # (B, 4, H/8, W/8): the latents that it comes from
    latents: Tensor  # (B, 4, H/8, W/8): where they lead
    error: float  # the distance of `latents` from the picture's, relative to their size
    missed: float  # the largest part of the latents that a step up had to leave to the way down
    pictures: list[Image.Image]
    psnr: list[float]  # dB, of each picture to the original
    limit: list[float]  # dB, of the VAE alone: no inversion can come nearer on average


def round_trip(
    sd: StableDiffusion,
    prompt: Texts,
    latents: Tensor,
    originals: list[Image.Image],
    up: Iterable[StepUp],
    **settings: Any,
) -> RoundTrip:
    """Finish the inversion `up` of `latents`, walk down again with the same settings, and compare with `originals`."""
    walk = list(up)
    *_, bottom = walk_down(sd, prompt, walk, **settings)
    back, alone = decoded(sd, bottom.latents), decoded(sd, latents)
    error = float((bottom.latents - latents).norm() / latents.norm())
    missed = max(float(step.miss.norm() / step.latents.norm()) for step in walk)
    lost, limit = ([psnr(one, other) for one, other in zip(originals, others, strict=True)] for others in (back, alone))
    return RoundTrip(walk[-1].latents, bottom.latents, error, missed, back, lost, limit)


def size_of(sd: StableDiffusion, latents: Tensor) -> dict[str, int]:
    """The height and width, in pixels, of what latents (B, 4, H/8, W/8) decode to."""
    height, width = (size * sd.vae.config.downsampling for size in latents.shape[2:])
    return {"height": height, "width": width}


@torch.no_grad()
def decoded(sd: StableDiffusion, latents: Tensor) -> list[Image.Image]:
    return to_pictures(sd.decode(latents))


def edit(
    sd: StableDiffusion,
    prompt: Texts,
    new_prompt: Texts,
    latents: Tensor,
    *,
    start: int = 0,
    exact: bool = True,
    **settings: Any,
) -> Iterator[Step]:
    """Change what `prompt` says of a picture's scaled `latents` to `new_prompt`: up to step `start`, then down again.

    `start` from 0 (all the way up to noise: the most freedom) to steps - 1 (hardly any). With new_prompt = prompt the
    picture comes back. The rest are `invert`'s settings. Yields the steps down.
    """
    walk = list(invert(sd, prompt, latents, start=start, exact=exact, **settings))
    yield from walk_down(sd, new_prompt, walk, **settings)
