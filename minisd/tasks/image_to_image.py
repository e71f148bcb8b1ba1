"""Image to image: begin not with pure noise, but with a picture that is drowned in noise only so far.

SDEdit (Meng et al. 2021, arXiv:2108.01073). In: a picture and a prompt. Out: the steps of `denoise`.

    picture --VAE--> z --add noise of step `start`--> x_start --denoise from there--> x_0
"""

from collections.abc import Iterator
from typing import Any

from minisd.noise import Generators, draw_noise
from minisd.pipeline import StableDiffusion, Step
from minisd.schedulers import Scheduler
from minisd.settings import Texts, list_of_texts, one_source
from minisd.tasks.images import Pictures, as_list, encode_pictures, fitting_size, to_images


def image_to_image(
    sd: StableDiffusion,
    prompt: Texts,
    image: Pictures,
    *,
    strength: float = 0.8,
    steps: int = 50,
    height: int | None = None,
    width: int | None = None,
    seed: int | None = None,
    generator: Generators = None,
    scheduler: Scheduler | str | None = None,
    images_per_prompt: int = 1,
    **settings: Any,
) -> Iterator[Step]:
    """Repaint `image` (one, or one for each prompt) as `prompt` says, one `Step` at a time.

    `strength`: how much of the way from noise is gone, above 0 (hardly any) to 1 (all of it: little of the picture is
    left). Of `steps` it takes the last strength * steps. `height`, `width`: the picture's own, unless given. The rest
    are `denoise`'s settings. The same numbers as diffusers' StableDiffusionImg2ImgPipeline, with one intended
    exception: several prompts times several pictures each stay together, where diffusers pairs them crosswise. Raises
    ValueError for a setting that is impossible.
    """
    pictures, generator = as_list(image), one_source(seed, generator)
    height, width = fitting_size(sd, pictures[0], height, width)
    count = len(list_of_texts("prompt", prompt)) * images_per_prompt
    sampler, start = sd.make_scheduler(scheduler), first_step(steps, strength)
    sampler.set_timesteps(steps, device=sd.device)

    z = encode_pictures(sd, to_images(pictures, height, width), count, generator)
    noise = draw_noise(z.shape, generator, sd.device, sd.dtype)
    yield from sd.denoise(
        prompt,
        latents=sampler.add_noise(z, noise, sampler.timesteps[start]),
        start=start,
        steps=steps,
        height=height,
        width=width,
        generator=generator,
        scheduler=sampler,
        images_per_prompt=images_per_prompt,
        **settings,
    )


def first_step(steps: int, strength: float) -> int:
    """The index of the first step to take. Raises ValueError for a strength outside 0 to 1, or of no step at all."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength}: must be from 0 to 1")
    taken = int(steps * strength)  # rounded down, as in diffusers
    if taken < 1:
        raise ValueError(f"strength={strength}: is less than one of {steps} steps; take more of either")
    return steps - taken
