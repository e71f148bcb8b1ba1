"""Inversion: from an image back to the noise that generates it; and editing, which samples again with another prompt.

DDIM with eta 0 is a deterministic, invertible map (Song et al. 2021, arXiv:2010.02502, section 4.3). But a sampling
step evaluates the UNet at its input x, and who inverts it knows only its output D(x). Two ways:

    plain   evaluate the UNet at D(x) instead: good without guidance and with many steps, useless with guidance
    exact   solve D(x) = y for x: y + (x - D(x)) has the x looked for as its fixed point (Pan et al. 2023,
            AIDI, arXiv:2309.04907). Guidance makes that iteration diverge now and then, so that it is
            accelerated by the last few tries (Anderson 1965; Walker & Ni 2011, doi:10.1137/10078356X)

The exact way inverts the sampler's own step, whatever that does: guidance, rescale, v-prediction, any spacing. But a
guided step does not reach every y. The residual of the best x is kept then, and added when sampling again (Ju et al.
2023, arXiv:2310.01506, do so with plain inversion, where residuals are large).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from minisd.pipeline import StableDiffusion
from minisd.sampling import Sampling, Step, Texts, matching_prompts
from minisd.schedulers import DDIMInverseScheduler, DDIMScheduler
from minisd.tasks.images import decoded, psnr, size_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from minisd.sampling import Settings

MOST_TRIES = 25  # UNet evaluations in a step; about six are usual
REMEMBERED = 5  # tries that Anderson acceleration combines
ROUNDINGS = 8  # an error of so many roundings, relative to the latents' size, is none


@dataclass
class InversionStep(Step):
    """An inverted sampling step: `latents` are noisier than before."""

    inverted: int  # the index of that step when sampling
    residual: Tensor  # (B, 4, H/8, W/8), what sampling from `latents` lacks: rounding, unless there is no such x


def invert(
    sd: StableDiffusion,
    prompt: Texts,
    latents: Tensor,
    *,
    exact: bool = True,
    start: int = 0,
    **settings: "Unpack[Settings]",
) -> Iterator[InversionStep]:
    """Invert DDIM sampling: from clean scaled `latents` (B, 4, H/8, W/8) to noise, for the same `prompt` and settings.

    Yields an `InversionStep` for each sampling step inverted; ends at the latents from which `denoise` samples again
    with the same `start`: 0 is the noise itself. Raises ValueError for a setting that is impossible.
    """
    sampling = Sampling(**settings)
    steps, _ = replace(sampling, start=start, latents=latents).steps_and_scale(sd.generation)
    scheduler = sd.make_scheduler(sampling.scheduler, steps)
    if sampling.eta or not isinstance(scheduler, DDIMScheduler):
        raise ValueError("inversion needs the ddim scheduler with eta 0: what is drawn at random cannot be undone")
    prompts, negatives = matching_prompts(prompt, sampling.negative_prompt)
    images, (height, width) = sampling.images_per_prompt, size_of(sd, latents)
    with torch.no_grad():  # encoded once: the exact way samples often
        both = sd.encode_prompt(prompts, negatives, images, sampling.clip_skip, sampling.long_prompts)
        unconditional, context = both.chunk(2)
    sd.initial_noise(
        (len(context), *sd.latent_shape(height, width)), None, latents
    )  # raises for latents that do not fit
    encoded = replace(sampling, negative_prompt=unconditional, images_per_prompt=1, clip_skip=0)
    sampling = replace(encoded, steps=steps, scheduler=scheduler, height=height, width=width)
    return (exact_steps if exact else plain_steps)(sd, context, latents, sampling, range(start, steps))


def plain_steps(
    sd: StableDiffusion, context: Tensor, latents: Tensor, sampling: Sampling, indices: range
) -> Iterator[InversionStep]:
    """DDIM's update with the next timestep's noise level, the UNet evaluated where the sampling step arrived."""
    assert isinstance(sampling.scheduler, DDIMScheduler)
    inverse = DDIMInverseScheduler.from_config(sampling.scheduler.config)
    steps = sd.denoise(context, sampling, latents=latents, scheduler=inverse)
    for index, step in zip(reversed(indices), steps, strict=False):
        yield InversionStep(**vars(step), inverted=index, residual=torch.zeros_like(latents))


def exact_steps(
    sd: StableDiffusion, context: Tensor, latents: Tensor, sampling: Sampling, indices: range
) -> Iterator[InversionStep]:
    """Each sampling step inverted by solving for its input."""
    for position, index in enumerate(reversed(indices)):

        def sampler_step(x: Tensor, index: int = index) -> Step:
            return next(sd.denoise(context, sampling, latents=x, start=index))

        latents, step, residual = solve(sampler_step, latents)
        yield InversionStep(position, step.timestep, latents, step.x0, index, residual)


@torch.no_grad()
def solve(sampler_step: Callable[[Tensor], Step], goal: Tensor) -> tuple[Tensor, Step, Tensor]:
    """The x whose step down arrives at `goal` (B, ...), that step, what it residuals: the best of all tries.

    Every sample goes its own way: Anderson's least squares are solved for each alone.
    """
    x, best, best_residual, least = goal, goal, goal, torch.full((len(goal),), torch.inf)
    tries: list[Tensor] = []
    residuals: list[Tensor] = []
    for _ in range(MOST_TRIES):
        step = sampler_step(x)
        missing = goal - step.latents
        residual = missing.flatten(1).double().cpu()  # (B, n)
        error = residual.norm(dim=1) / goal.flatten(1).double().cpu().norm(dim=1)
        better = error < least
        here = better.to(x.device)[:, None, None, None]
        best, best_residual = torch.where(here, x, best), torch.where(here, missing, best_residual)
        least = torch.where(better, error, least)
        if least.max() <= ROUNDINGS * torch.finfo(goal.dtype).eps:
            break
        tries = [*tries[-REMEMBERED:], x.flatten(1).double().cpu()]
        residuals = [*residuals[-REMEMBERED:], residual]
        x = next_try(tries, residuals).reshape(goal.shape).to(goal)
    return best, step, best_residual


def next_try(tries: list[Tensor], residuals: list[Tensor]) -> Tensor:
    """Anderson acceleration: the mixture of tries whose residuals (B, n) cancel best, plus what is left of them."""
    x, residual = tries[-1], residuals[-1]
    if len(tries) == 1:
        return x + residual
    steps = torch.stack(tries).diff(dim=0).permute(1, 2, 0)  # (B, n, m)
    changes = torch.stack(residuals).diff(dim=0).permute(1, 2, 0)  # (B, n, m)
    weights = torch.linalg.lstsq(changes, residual[..., None]).solution  # (B, m, 1)
    return x + residual - ((steps + changes) @ weights).squeeze(-1)


def reconstruct(
    sd: StableDiffusion, prompt: Texts, inversion: Sequence[InversionStep], **settings: "Unpack[Settings]"
) -> Iterator[Step]:
    """Sample again from where `inversion`, the steps of `invert`, ends: `denoise`, with each step's residual added.

    With the prompt and settings of the inversion the image comes back; with another prompt, it is edited.
    """
    residuals = {step.inverted: step.residual for step in inversion}
    top = inversion[-1]
    height, width = size_of(sd, top.latents)
    sampling = replace(Sampling(**settings), height=height, width=width)
    for step in sd.denoise(prompt, sampling, latents=top.latents, start=top.inverted):
        step.latents = step.latents + residuals[step.index]
        yield step


@dataclass(frozen=True)
class RoundTrip:
    """An image inverted to noise and sampled again, and what was lost."""

    noise: Tensor  # (B, 4, H/8, W/8): the latents that it comes from
    latents: Tensor  # (B, 4, H/8, W/8): where they lead
    error: float  # the distance of `latents` from the image's, relative to their size
    missed: float  # the largest residual of a step, relative to the latents
    pictures: list[Image.Image]
    psnr: list[float]  # dB, of each image to the original
    limit: list[float]  # dB, of the VAE alone: no inversion can come nearer on average


def round_trip(
    sd: StableDiffusion,
    prompt: Texts,
    latents: Tensor,
    originals: list[Image.Image],
    inversion: Iterable[InversionStep],
    **settings: "Unpack[Settings]",
) -> RoundTrip:
    """Finish the inversion of `latents`, sample again with the same settings, and compare with `originals`."""
    steps = list(inversion)
    *_, last = reconstruct(sd, prompt, steps, **settings)
    back, alone = decoded(sd, last.latents), decoded(sd, latents)
    error = float((last.latents - latents).norm() / latents.norm())
    missed = max(float(step.residual.norm() / step.latents.norm()) for step in steps)
    lost, limit = ([psnr(one, other) for one, other in zip(originals, others, strict=True)] for others in (back, alone))
    return RoundTrip(steps[-1].latents, last.latents, error, missed, back, lost, limit)


def edit(
    sd: StableDiffusion,
    prompt: Texts,
    new_prompt: Texts,
    latents: Tensor,
    *,
    start: int = 0,
    exact: bool = True,
    **settings: "Unpack[Settings]",
) -> Iterator[Step]:
    """Change what `prompt` says of an image's scaled `latents` to `new_prompt`: invert to step `start`, sample again.

    `start` from 0 (back to pure noise: the most freedom) to steps - 1 (hardly any). With new_prompt = prompt the
    image comes back. `settings` are `invert`'s. Yields the sampling steps.
    """
    inversion = invert(sd, prompt, latents, start=start, exact=exact, **settings)

    def resampled() -> Iterator[Step]:
        yield from reconstruct(sd, new_prompt, list(inversion), **settings)

    return resampled()
