"""Every setting of a generation, once: `Sampling`, checked when it is made; and `Step`, what the sampling loop yields.

`StableDiffusion.denoise`, every task, the command line and the diffusers dialect describe what they want as a
`Sampling`. Back to the walk: `pipeline.py`.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, TypedDict

import torch
from torch import Tensor

from minisd.noise import Generators
from minisd.schedulers import DDIMScheduler, DDPMScheduler, LCMScheduler, Scheduler, equations, named
from minisd.schedulers.exponential import ExponentialScheduler
from minisd.warn import warn

Texts = str | list[str] | Tensor  # a prompt, several, or their token embeddings after the text encoder (B, 77, D)
PredictNoise = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]  # x, t, context, guidance scale and rescale


SEEDS = 2**32


@dataclass
class Step:
    """One step of the sampling loop. A consumer may assign other `latents`: the loop goes on from those."""

    index: int  # 0, 1, 2, ...
    timestep: int  # the timestep that the UNet was called with: falling, from about 1000 towards 0
    latents: Tensor  # x_{t-1}: (B, 4, H/8, W/8), after the step
    x0: Tensor  # x0-hat, the predicted clean latents (B, 4, H/8, W/8): to_pictures(sd.decode(step.x0)) is a preview

    def _repr_png_(self) -> bytes:
        """In a notebook: the channels of the first x0-hat side by side, from black, the least, to white."""
        from PIL import Image

        rows = self.x0[0].detach().float().cpu().permute(1, 0, 2).flatten(1)  # (H/8, 4 * W/8)
        low, high = rows.min(), rows.max()
        levels = ((rows - low) / (high - low).clamp(min=1e-12) * 255).round().byte().numpy()
        larger, file = max(1, 128 // len(levels)), io.BytesIO()
        image = Image.fromarray(levels)
        image.resize((image.width * larger, image.height * larger), 0).save(file, "PNG")
        return file.getvalue()


class Settings(TypedDict, total=False):
    """The fields of `Sampling` as keyword arguments, so that type checkers know what the tasks take."""

    negative_prompt: Texts
    steps: int | None
    guidance_scale: float | None
    guidance_rescale: float
    height: int | None
    width: int | None
    seed: int | None
    generator: Generators
    scheduler: Scheduler | str | None
    eta: float
    images_per_prompt: int
    clip_skip: int
    long_prompts: bool
    predict_noise: PredictNoise | None
    original_size: tuple[int, int] | None
    crop: tuple[int, int] | None
    target_size: tuple[int, int] | None
    aesthetic_score: float
    negative_aesthetic_score: float


class LoopSettings(Settings, total=False):
    """The same for `denoise`, which takes all fields."""

    latents: Tensor | None
    start: int | None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of a generation. Raises ValueError, with the name and value, for one that is impossible.

    `negative_prompt`    what classifier-free guidance moves away from: one, or one for each prompt
    `steps`              denoising steps; None: what the model's makers recommend, else 50
    `guidance_scale`     of classifier-free guidance; up to 1 there is none, and `negative_prompt` has no effect.
                         None: what the model's makers recommend, else 7.5
    `guidance_rescale`   0 to 1, against overexposure by strong guidance (Lin et al. 2023, arXiv:2305.08891)
    `height`, `width`    in pixels, multiples of the VAE's factor, 8; None: the size that the model was trained at
    `seed`, `generator`  one of the two: the source of all noise, drawn on the CPU, so that a seed is the same image on
                         every device; a list of generators has one for each image. None: torch's global generator
    `latents`            (B, 4, H/8, W/8), initial noise of unit variance in the place of drawn noise
    `scheduler`          a name of `schedulers/names.py` ("ddim", the default; "euler_a", "DPM++ 2M Karras"), "model"
                         for the one that the model's folder names, or a scheduler object
    `eta`                0 (DDIM, deterministic) to 1 (as random as DDPM); others than DDIM ignore it
    `images_per_prompt`  how many images to generate of each prompt
    `clip_skip`          how many of the text encoder's last layers to leave out
    `long_prompts`       encode prompts of more than 75 tokens in windows of 75 (`context.py`), instead of cutting them
    `original_size`, `crop`, `target_size`  what SDXL is told of the picture (`xl.py`): height and width before it was
                         cropped, top and left of the crop, height and width asked for. None: the image's, (0, 0)
    `aesthetic_score`, `negative_aesthetic_score`  what its refiner is told in the place of the size asked for: how
                         beautiful, from 0 to 10

    Two openings serve the tasks: `start`, the index of the first of `steps` to take, for `latents` that are already at
    the noise level of that step; and `predict_noise`, in the place of `StableDiffusion.predict_noise`.
    """

    negative_prompt: Texts = ""
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    generator: Generators = None
    latents: Tensor | None = None
    scheduler: Scheduler | str | None = None
    eta: float = 0.0
    images_per_prompt: int = 1
    clip_skip: int = 0
    long_prompts: bool = False
    start: int | None = None
    predict_noise: PredictNoise | None = None
    original_size: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    def __post_init__(self) -> None:
        list_of_texts("negative_prompt", self.negative_prompt)
        for name, count in (("steps", self.steps), ("images_per_prompt", self.images_per_prompt)):
            if count is not None or name != "steps":
                check_whole(name, count, least=1)
        check_whole("clip_skip", self.clip_skip, least=0)
        for name in ("original_size", "crop", "target_size"):
            check_two(name, getattr(self, name))
        for name in ("guidance_scale", "guidance_rescale", "eta", "aesthetic_score", "negative_aesthetic_score"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, Real) or not 0 <= float(number) < float("inf")):
                raise ValueError(f"{name}={number}: must be a finite number, at least 0")
        if isinstance(self.scheduler, str) and self.scheduler != "model":
            named(self.scheduler)
        self.make_generator()
        if self.seed is not None:
            tell_seed(self.seed)
        if self.start is not None:
            check_whole("start", self.start, least=0)  # how many steps there are, the model knows

    def steps_and_scale(self, generation: Mapping[str, Any]) -> tuple[int, float]:
        """The numbers of `steps` and `guidance_scale`: what was asked, else what the model recommends, else 50, 7.5."""
        steps = generation.get("steps", 50) if self.steps is None else self.steps
        scale = generation.get("guidance_scale", 7.5) if self.guidance_scale is None else self.guidance_scale
        if (self.start or 0) >= steps:
            raise ValueError(
                f"start={self.start}: must be a whole number from 0 to {steps - 1}, the index of one of {steps} steps"
            )
        if self.start and self.latents is None:
            raise ValueError(f"start={self.start}: needs latents, at the noise level of that step")
        return steps, scale

    def with_generator(self) -> "Sampling":
        """The same with a generator in the place of the seed, for a task that draws before the loop does."""
        return replace(self, seed=None, generator=self.make_generator())

    def make_generator(self) -> Generators:
        """The one source of randomness: the generator, a new one from `seed`, or None for torch's global one."""
        if self.seed is None:
            return self.generator
        if self.generator is not None:
            raise ValueError("seed and generator: give one of the two")
        try:
            return torch.Generator().manual_seed(self.seed)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"seed={self.seed!r}: must be a whole number of at most 64 bits") from None


FIELDS = frozenset(field.name for field in fields(Sampling))


def set_steps(scheduler: Any, steps: int) -> None:
    """Set a scheduler's timesteps, on the CPU: there no accelerator waits when one is read.

    Raises ValueError for a number of steps that its schedule does not have.
    """
    total = len(scheduler)  # diffusers counts a scheduler's length in training timesteps
    if steps > total:
        raise ValueError(f"steps={steps}: must be at most the schedule's {total}")
    try:
        scheduler.set_timesteps(steps, device="cpu")
        # Those that work with sigmas read no table at a timestep, and can have one beyond the last.
        fits = hasattr(scheduler, "sigmas") or int(scheduler.timesteps.max()) < total
    except IndexError:  # of the table of noise levels
        fits = False
    except ValueError as error:  # in diffusers' name of the argument
        raise ValueError(str(error).replace("num_inference_steps", "steps")) from None
    if fits and isinstance(scheduler, ExponentialScheduler):
        fits = bool((scheduler.sigmas.diff() != 0).all())  # it divides by the width of a step
    if not fits:
        spacing = getattr(scheduler, "timestep_spacing", "its")
        raise ValueError(f"steps={steps}: too many for this scheduler with {spacing} spacing of {total} timesteps")


def check_divisions(scheduler: Any, eta: float, start: int) -> None:
    """Raise ValueError for settings under which a step divides by zero, or takes the root of a negative number."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(scheduler, DDIMScheduler | DDPMScheduler | LCMScheduler) or table is None or table[-1] != 0:
        return
    for t in scheduler.timesteps[start:].tolist():
        if scheduler.prediction_type == "epsilon" and table[t] == 0:
            raise ValueError(
                f"prediction epsilon with zero terminal SNR: timestep {t} is pure noise, from which no image can be "
                "predicted; take a model that predicts v, timestep_spacing='leading', or rescale_betas_zero_snr=False"
            )
        if isinstance(scheduler, DDIMScheduler) and eta > 0:
            before = scheduler.alpha_bar(t - len(scheduler) // scheduler.timesteps.numel())
            variance = (eta * equations.posterior_variance(table[t], before) ** 0.5) ** 2
            if 1 - before - variance < 0:  # equations.ddim_update takes its root
                raise ValueError(f"eta={eta}: with zero terminal SNR must be below 1, by rounding; take 0.999")


def tell_seed(seed: int) -> None:
    """Warn of a seed that is another's equal: torch's generator on a CPU keeps 32 bits of it."""
    if not 0 <= seed < SEEDS:
        warn(f"seed={seed}: draws the same numbers as seed={seed % SEEDS}; there are 2**32 seeds")


def check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value}: must be a whole number, at least {least}")


def check_two(name: str, value: Any) -> None:
    numbers = value if isinstance(value, tuple | list) else ()  # JSON knows lists only
    if value is not None and (len(numbers) != 2 or not all(isinstance(n, int) and n >= 0 for n in numbers)):
        raise ValueError(f"{name}={value!r}: must be two whole numbers, of the height and of the width")


def list_of_texts(name: str, value: Texts) -> list[str] | Tensor:
    """A list of texts; context (B, T, D) stays what it is."""
    if isinstance(value, Tensor):
        if value.ndim != 3:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}: context has three dimensions, (B, 77, D)")
        return value
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={value!r}: must be a text or a list of at least one text")
    return list(texts)


def matching_prompts(prompt: Texts, negative: Texts) -> tuple[list[str] | Tensor, list[str] | Tensor]:
    """Lists of equal length; one negative prompt serves all. Raises ValueError for no prompt, or for two lengths."""
    prompts, negatives = list_of_texts("prompt", prompt), list_of_texts("negative_prompt", negative)
    if isinstance(negative, str):
        negatives = [negative] * len(prompts)
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt: {len(negatives)} for {len(prompts)} prompts; give one, or one each")
    return prompts, negatives
