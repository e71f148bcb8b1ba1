"""What the tasks' commands do: read pictures, settle the settings, run the task, write. See `minisd COMMAND --help`."""

import io
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from minisd.checkpoint.load import open_checkpoint
from minisd.cli.output import Job, png_path, prepare, report
from minisd.files import write_whole
from minisd.pipeline import to_pictures
from minisd.settings import Texts, check_start
from minisd.tasks.guidance import LossGuidance, colour_loss, compose, parse_weights, weighted_context
from minisd.tasks.image_to_image import first_step, image_to_image
from minisd.tasks.images import mean_latents, read_picture, to_images
from minisd.tasks.inpainting import inpaint as inpaint_steps
from minisd.tasks.interpolation import interpolate as interpolate_steps
from minisd.tasks.interpolation import make_strip
from minisd.tasks.inversion import edit as edit_steps
from minisd.tasks.inversion import invert as invert_steps
from minisd.tasks.inversion import round_trip
from minisd.tasks.schedule import as_picture, as_text, make_scheduler, read_changes, visited


def img2img(*, image: str, strength: float | None, **options: Any) -> None:
    strength = 0.8 if strength is None else strength
    picture = read_picture(image)
    job = prepare(**options, picture=picture, strength=strength)
    taken = job.settings.steps - first_step(job.settings.steps, strength)
    steps = image_to_image(job.sd, job.settings.prompt, picture, strength=strength, **job.denoising())
    job.write(job.paint(steps, taken))


def inpaint(*, image: str, mask: str, strength: float | None, **options: Any) -> None:
    strength = 1.0 if strength is None else strength
    picture, hole = read_picture(image), read_picture(mask)
    job = prepare(**options, picture=picture, strength=strength)
    taken = job.settings.steps - first_step(job.settings.steps, strength)
    steps = inpaint_steps(job.sd, job.settings.prompt, picture, hole, strength=strength, **job.denoising())
    job.write(job.paint(steps, taken))


def invert(*, image: str, plain: bool, **options: Any) -> None:
    """Writes the picture as it comes back, and beside it the noise that it comes from."""
    job, images, latents = prepare_walk_up(image, way="plain" if plain else "exact", **options)
    noise_path = job.paths.output.with_suffix(".safetensors")
    if noise_path.is_dir():
        raise ValueError(f"{noise_path}: is a folder")
    settings = walking(job)
    up = invert_steps(job.sd, job.settings.prompt, latents, exact=not plain, **settings)
    trip = round_trip(job.sd, job.settings.prompt, latents, to_pictures(images), job.progress(up), **settings)
    found: dict[str, Any] = {
        "error": trip.error,
        "psnr": trip.psnr[0],
        "psnr_of_vae": trip.limit[0],
        "missed": trip.missed,
        "noise": str(noise_path),
    }
    write_whole(
        noise_path, save({"latents": trip.noise.cpu().contiguous()}, {"parameters": job.settings.parameters(0)})
    )
    if not job.as_json:
        print(f"latents come back with an error of {trip.error:.1e} of their size")
        print(f"the picture with {trip.psnr[0]:.2f} dB PSNR; through the VAE alone it has {trip.limit[0]:.2f} dB")
        print(noise_path)
    job.write(trip.pictures, **found)


def edit(*, image: str, new_prompt: str, start: int | None, plain: bool, **options: Any) -> None:
    """A good start is where colours are still open and shapes no longer: by default after a fifth of the steps."""
    job, _, latents = prepare_walk_up(image, new_prompt=new_prompt, way="plain" if plain else "exact", **options)
    start = job.settings.steps // 5 if start is None else start
    check_start(start, job.settings.steps, latents)
    job.settings.extra["start"] = start
    down = edit_steps(job.sd, job.settings.prompt, new_prompt, latents, start=start, exact=not plain, **walking(job))
    job.write(job.paint(down, job.settings.steps - start))


def prepare_walk_up(image: str, **options: Any) -> tuple[Job, Tensor, Tensor]:
    """The job, the picture as an image (1, 3, H, W), and its latents."""
    picture = read_picture(image)
    job = prepare(**options, seed=0, picture=picture)
    images = to_images([picture], job.settings.height, job.settings.width)
    return job, images, mean_latents(job.sd, images)


def walking(job: Job) -> dict[str, Any]:
    """The settings that a walk up and down shares."""
    names = ("negative_prompt", "steps", "guidance_scale", "guidance_rescale", "clip_skip")
    settings = job.denoising()
    return {name: settings[name] for name in names}


def schedule(
    *, output: str | None, model: str, steps: int | None, scheduler: str, changes: tuple[str, ...], as_json: bool
) -> None:
    """Text in the terminal, or a PNG, or JSON."""
    path = png_path(output) if output else None
    checkpoint = open_checkpoint(model, dtype=None)  # reads the configuration; the weights stay where they are
    steps = steps or checkpoint.generation.get("steps", 50)
    made = make_scheduler(checkpoint.scheduler, scheduler, read_changes(changes))
    told: dict[str, Any] = {"steps": steps, "timesteps": visited(made, steps), "output": str(path) if path else None}
    if path is not None:
        data = io.BytesIO()
        as_picture(made, steps).save(data, format="PNG")
        write_whole(path, data.getvalue())
    elif not as_json:
        print(as_text(made, steps))
    report([path] if path else [], {**told, "alphas_cumprod": made.alphas_cumprod.tolist()}, as_json)


def interpolate(
    *,
    prompt: str,
    to_prompt: str | None,
    to_seed: int | None,
    pictures: tuple[str, str] | None,
    frames: int,
    output: str | None,
    **options: Any,
) -> None:
    """Writes the frames, a strip of them, and a GIF."""
    if output is not None and not output.lower().endswith(".gif"):
        raise ValueError(f"{output}: the name must end in .gif (frames and strip are named after it)")
    ends = [read_picture(path) for path in pictures or ()]
    if ends:
        options["seed"] = 0  # nothing is drawn
    png = None if output is None else str(Path(output).with_suffix(".png"))
    picture = ends[0] if ends else None
    job = prepare(prompt=prompt, output=png, images=frames, picture=picture, frames=frames, **options)
    gif = job.paths.output.with_suffix(".gif")
    if gif.is_dir():
        raise ValueError(f"{gif}: is a folder; name a file in it")
    settings, prompts = walking(job), (prompt, prompt if to_prompt is None else to_prompt)
    job.settings.extra |= {"to_prompt": to_prompt} if to_prompt is not None else {}
    if ends:
        images = to_images(ends, job.settings.height, job.settings.width)
        up = invert_steps(job.sd, list(prompts), mean_latents(job.sd, images), **settings)
        *_, top = job.progress(up)
        noises = top.latents[:1], top.latents[1:]
    else:
        seeds = job.settings.seed, job.settings.seed + 1 if to_seed is None else to_seed
        job.settings.extra["to_seed"] = seeds[1]
        shape = (1, job.sd.vae.config.latent_channels, *job.sd.latent_size(job.settings.height, job.settings.width))
        one, other = (job.sd.initial_noise(shape, torch.Generator().manual_seed(seed), None) for seed in seeds)
        noises = one, other
    painted = job.paint(interpolate_steps(job.sd, prompts, noises, frames=frames, **settings))
    data = io.BytesIO()
    painted[0].save(data, format="GIF", save_all=True, append_images=painted[1:], duration=120, loop=0)
    write_whole(gif, data.getvalue())
    job.write(painted, together=make_strip, last=gif, gif=str(gif))


def guide(
    *,
    others: tuple[str, ...],
    weight: float,
    weighted: bool,
    colour: str | None,
    colour_scale: float,
    **options: Any,
) -> None:
    loss = colour_loss(colour) if colour is not None else None
    several = [weighted_prompt(other) for other in others]
    for text in (options["prompt"], options["negative"], *(text for text, _ in several)) if weighted else ():
        parse_weights(text)  # before the model is loaded
    extra: dict[str, Any] = {"weighted": True} if weighted else {}
    extra |= {"and": "; ".join(others), "prompt_weight": weight} if others else {}
    extra |= {"colour": colour, "colour_scale": colour_scale} if colour is not None else {}
    job = prepare(**options, **extra)
    sd, settings, prompt = job.sd, job.denoising(), job.settings.prompt

    def read(text: str) -> Texts:
        return weighted_context(sd, text, job.settings.clip_skip) if weighted else text

    predict_noise = compose(sd, [(read(text), w) for text, w in several], weight) if several else sd.predict_noise
    if loss is not None:
        scheduler = job.settings.scheduler
        predict_noise = LossGuidance(sd, loss, scale=colour_scale, scheduler=scheduler, predict_noise=predict_noise)
    settings["negative_prompt"] = read(job.settings.negative)
    job.write(job.paint(sd.denoise(read(prompt), **settings, predict_noise=predict_noise)))


def weighted_prompt(text: str) -> tuple[str, float]:
    """ "blue circle:0.5" -> ("blue circle", 0.5); without a number the weight is 1."""
    words, colon, number = text.rpartition(":")
    try:
        return (words, float(number)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0
