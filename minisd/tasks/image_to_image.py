"""Image to image, SDEdit: noise the encoded image to an intermediate timestep, and denoise from there.

Meng et al. 2021, arXiv:2108.01073. In: an image and a prompt. Out: the steps of `denoise`.

    image --VAE encoder--> x0 --add_noise at step `start`--> x_t --denoise from there--> another x0
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from minisd.noise import draw_noise
from minisd.pipeline import StableDiffusion
from minisd.sampling import Sampling, Step, Texts, list_of_texts
from minisd.tasks.images import encode_pictures, fitting_size
from minisd.tasks.pictures import Pictures, as_list, to_images

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from minisd.sampling import Settings


def image_to_image(
    sd: StableDiffusion, prompt: Texts, image: Pictures, *, strength: float = 0.8, **settings: "Unpack[Settings]"
) -> Iterator[Step]:
    """Change `image` (one, or one for each prompt) into what `prompt` says, one `Step` at a time.

    `strength`: up to which noise level, above 0 (hardly any noise) to 1 (nothing but noise, nearly): the last
    strength * steps of the steps are taken. `settings` are those of `denoise`; `height`, `width` are the image's own
    unless given. The same numbers as diffusers' StableDiffusionImg2ImgPipeline, with one intended exception: several
    prompts times several images each stay together, where diffusers pairs them crosswise. Raises ValueError for a
    setting that is impossible.
    """
    sampling, pictures = Sampling(**settings).with_generator(), as_list(image)
    steps, _ = sampling.steps_and_scale(sd.generation)
    start = first_step(steps, strength)
    height, width = fitting_size(sd, pictures[0], sampling.height, sampling.width)
    sampling = replace(sampling, steps=steps, height=height, width=width)
    count = len(list_of_texts("prompt", prompt)) * sampling.images_per_prompt

    x0 = encode_pictures(sd, to_images(pictures, height, width), count, sampling.generator)
    noise = draw_noise(x0.shape, sampling.generator, sd.device, sd.dtype)
    return denoise_from(sd, prompt, x0, noise, sampling, start)


def denoise_from(
    sd: StableDiffusion, prompt: Texts, x0: Tensor, noise: Tensor, sampling: Sampling, start: int
) -> Iterator[Step]:
    """Noise scaled clean latents `x0` (B, 4, H/8, W/8) to the level that step `start` expects; denoise from there."""
    scheduler = sd.make_scheduler(sampling.scheduler, sampling.steps)
    begin = start * scheduler.order
    scheduler.set_begin_index(begin)
    x = scheduler.add_noise(x0, noise, scheduler.timesteps[begin])
    return sd.denoise(prompt, sampling, latents=x, start=start, scheduler=scheduler)


def first_step(steps: int, strength: float) -> int:
    """The index of the first step to take. Raises ValueError for a strength outside 0 to 1, or of no step at all."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength}: must be from 0 to 1")
    taken = int(steps * strength)  # rounded down, as in diffusers
    if taken < 1:
        raise ValueError(f"strength={strength}: is less than one of {steps} steps; take more of either")
    return steps - taken
