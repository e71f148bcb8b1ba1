"""The commands that make pictures: each turns its options into a `Sampling`, runs a task, and writes what comes out.

Only click is imported here; what needs torch is imported when a command runs.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minisd.cli.options import GENERATION, INVERSION, REPORT, PictureCommand, options, text_and_number

if TYPE_CHECKING:
    from torch import Tensor

    from minisd.cli.job import Job


@click.command(cls=PictureCommand)
@click.argument("prompt")
@options(*GENERATION, "check")
def generate(prompt: str, check: bool, **options: Any) -> None:
    """Generate images from PROMPT."""
    from minisd.cli.job import Job

    job = Job.prepare(prompt, options)
    if check:
        return run_checked(job)
    return job.write(job.run(partial(job.sd.denoise, prompt)))


def run_checked(job: "Job") -> None:
    """Generate, and say where the first value is that is not finite, and how large values get."""
    from minisd.lab.finite import nan_tracer

    with nan_tracer(job.sd) as trace:
        pictures = job.run(partial(job.sd.denoise, job.prompt))
    if not job.options["as_json"]:
        click.echo("\n".join(trace.lines()), err=True)
    job.write(pictures, check=trace.as_dict())


@click.command(cls=PictureCommand)
@click.argument("prompt")
@click.argument("image", metavar="PICTURE")
@options("output", "strength", *GENERATION[1:])
def img2img(prompt: str, image: str, strength: float | None, **options: Any) -> None:
    """Change PICTURE into what PROMPT says (SDEdit). What is transparent in it is white."""
    from minisd.cli.job import Job
    from minisd.tasks.image_to_image import first_step, image_to_image
    from minisd.tasks.pictures import read_picture

    strength, picture = 0.8 if strength is None else strength, read_picture(image)
    job = Job.prepare(prompt, options, picture, strength=strength)
    taken = job.steps - first_step(job.steps, strength)
    job.write(job.run(partial(image_to_image, job.sd, prompt, picture, strength=strength), taken))


@click.command(cls=PictureCommand)
@click.argument("prompt")
@click.argument("image", metavar="PICTURE")
@click.argument("mask")
@options("output", "strength", "keep-outside", *GENERATION[1:])
def inpaint(prompt: str, image: str, mask: str, strength: float | None, keep_outside: bool, **options: Any) -> None:
    """Generate PROMPT in PICTURE where the picture MASK is white.

    Outside the mask PICTURE stays as it is. What is transparent in MASK is not masked, and in PICTURE it is white.
    """
    from minisd.cli.job import Job
    from minisd.tasks.image_to_image import first_step
    from minisd.tasks.inpainting import inpaint
    from minisd.tasks.pictures import read_mask, read_picture

    strength, picture, hole = 1.0 if strength is None else strength, read_picture(image), read_mask(mask)
    job = Job.prepare(prompt, options, picture, strength=strength)
    taken = job.steps - first_step(job.steps, strength)
    denoise = partial(inpaint, job.sd, prompt, picture, hole, strength=strength, keep_outside=keep_outside)
    job.write(job.run(denoise, taken))


@click.command(cls=PictureCommand)
@click.argument("prompt")
@click.argument("image", metavar="PICTURE")
@options(*INVERSION, "plain")
def invert(prompt: str, image: str, plain: bool, **options: Any) -> None:
    """Find the noise that generates PICTURE under PROMPT; write it, and the picture that comes back from it."""
    from safetensors.torch import save

    from minisd.cli.output import check_no_folder
    from minisd.files import write_whole
    from minisd.metadata.writing import parameters
    from minisd.pipeline import to_pictures
    from minisd.tasks.inversion import invert, round_trip

    job, images, latents = prepare_inversion(prompt, image, options, way="plain" if plain else "exact")
    noise = job.paths.output.with_suffix(".safetensors")
    check_no_folder(noise)
    steps = job.progress(invert(job.sd, prompt, latents, exact=not plain, **job.settings))
    trip = round_trip(job.sd, prompt, latents, to_pictures(images), steps, **job.settings)
    text = parameters(job.told(), job.extra, seed=0)
    write_whole(noise, save({"latents": trip.noise.cpu().contiguous()}, {"parameters": text}))
    if not options["as_json"]:
        click.echo(f"latents come back with an error of {trip.error:.1e} of their size")
        click.echo(f"the picture with {trip.psnr[0]:.2f} dB PSNR; through the VAE alone it has {trip.limit[0]:.2f} dB")
        click.echo(str(noise))
    found: dict[str, Any] = {
        "error": trip.error,
        "psnr": trip.psnr[0],
        "psnr_of_vae": trip.limit[0],
        "missed": trip.missed,
    }
    job.write(trip.pictures, **found, noise=str(noise))


@click.command(cls=PictureCommand)
@click.argument("prompt")
@click.argument("new_prompt")
@click.argument("image", metavar="PICTURE")
@options(*INVERSION, "start", "plain")
def edit(prompt: str, new_prompt: str, image: str, start: int | None, plain: bool, **options: Any) -> None:
    """Change PICTURE, which shows PROMPT, into NEW_PROMPT: by inversion, so that the rest stays. Guidance is 2 here."""
    from minisd.tasks.inversion import edit

    way = "plain" if plain else "exact"
    options["guidance_scale"] = guidance_of_edits(options)
    job, _, latents = prepare_inversion(prompt, image, options, new_prompt=new_prompt, way=way)
    # After a tenth of the steps colours are still open, and shapes hardly any longer.
    start = job.extra["start"] = job.steps // 10 if start is None else start
    denoise = partial(edit, job.sd, prompt, new_prompt, latents, start=start, exact=not plain)
    job.write(job.run(denoise, job.steps - start))


@click.command(cls=PictureCommand)
@click.argument("prompt")
@click.argument("new_prompt")
@click.argument("image", metavar="[PICTURE]", required=False)
@options("seed", "cross", "self-attention", "reweight", *INVERSION)
def p2p(
    prompt: str,
    new_prompt: str,
    image: str | None,
    cross: float,
    self_attention: float,
    reweight: tuple[str, ...],
    **options: Any,
) -> None:
    """Generate NEW_PROMPT with the attention of PROMPT, so that the layout stays (prompt-to-prompt).

    Or change PICTURE so, which shows PROMPT: it is inverted exactly first, and guidance is 2 then.
    """
    from minisd.cli.job import Job
    from minisd.tasks.images import psnr
    from minisd.tasks.prompt_to_prompt import prompt_to_prompt

    extra: dict[str, Any] = {"new_prompt": new_prompt, "cross": cross, "self_attention": self_attention}
    extra |= {"reweight": ", ".join(reweight)} if reweight else {}
    if image is None:
        job, latents = Job.prepare(prompt, options, **extra), None
    else:
        options |= {"seed": 0, "guidance_scale": guidance_of_edits(options)}
        job, _, latents = prepare_inversion(prompt, image, options, **extra)
    control: dict[str, Any] = {"cross": cross, "self_attention": self_attention}
    control["weights"] = dict(map(text_and_number, reweight))
    old, new = job.run(partial(prompt_to_prompt, job.sd, prompt, new_prompt, latents=latents, **control))
    job.write([new], psnr=psnr(old, new) if old != new else None)


def guidance_of_edits(options: dict[str, Any]) -> float:
    """What is enough for new pictures pulls a real one apart."""
    return 2.0 if options["guidance_scale"] is None else options["guidance_scale"]


def prepare_inversion(
    prompt: str, image: str, options: dict[str, Any], **extra: Any
) -> tuple["Job", "Tensor", "Tensor"]:
    """The job, the picture as an image (1, 3, H, W), and its latents."""
    from minisd.cli.job import Job
    from minisd.tasks.images import mean_latents
    from minisd.tasks.pictures import read_picture, to_images

    picture = read_picture(image)
    job = Job.prepare(prompt, options, picture, **extra)
    images = to_images([picture], *job.size)
    return job, images, mean_latents(job.sd, images)


@click.command(cls=PictureCommand)
@options("picture-output", "model", "steps", "scheduler", "set", REPORT[0])
def schedule(
    output: str | None, model: str, steps: int | None, scheduler: str, changes: tuple[str, ...], as_json: bool
) -> None:
    """Show a noise schedule: alpha_bar, SNR, and the timesteps that each spacing visits.

    As text in the terminal, or with -o as a picture.
    """
    from minisd.checkpoint.load import open_checkpoint
    from minisd.cli.output import png_path, report, write_picture
    from minisd.tasks.schedule import as_picture, as_text, make_scheduler, read_changes, visited

    path = png_path(output) if output else None
    checkpoint = open_checkpoint(model, dtype=None)  # reads the configuration; the weights stay where they are
    steps = steps or checkpoint.generation.get("steps", 50)
    made = make_scheduler(checkpoint.scheduler, scheduler, read_changes(changes))
    told: dict[str, Any] = {"steps": steps, "timesteps": visited(made, steps), "output": str(path) if path else None}
    if path is not None:
        write_picture(path, as_picture(made, steps), format="PNG")
    elif not as_json:
        click.echo(as_text(made, steps))
    report([path] if path else [], {**told, "alphas_cumprod": made.alphas_cumprod.tolist()}, as_json)


@click.command(cls=PictureCommand)
@click.argument("prompt")
@click.argument("to_prompt", required=False)
@options("gif", "frames", "to-seed", "pictures", "seed", *INVERSION[1:])
def interpolate(
    prompt: str,
    to_prompt: str | None,
    pictures: tuple[str, str] | None,
    to_seed: int | None,
    frames: int,
    **options: Any,
) -> None:
    """Interpolate from PROMPT to TO_PROMPT, and from one seed, or one picture, to another.

    Writes the frames, all of them in a strip, and a GIF.
    """
    from minisd.cli.job import Job
    from minisd.cli.output import check_no_folder, write_picture
    from minisd.tasks.interpolation import interpolate, make_strip
    from minisd.tasks.pictures import read_picture

    output = options["output"]
    if output is not None and not output.lower().endswith(".gif"):
        raise ValueError(f"{output}: the name must end in .gif (frames and strip are named after it)")
    options["output"] = None if output is None else str(Path(output).with_suffix(".png"))
    ends = [read_picture(path) for path in pictures or ()]
    if ends:
        options["seed"] = 0  # nothing is drawn
    job = Job.prepare(prompt, options, ends[0] if ends else None, frames=frames)
    gif = job.paths.output.with_suffix(".gif")
    check_no_folder(gif)
    prompts = (prompt, prompt if to_prompt is None else to_prompt)
    job.extra |= {"to_prompt": to_prompt} if to_prompt is not None else {}
    noises = inverted(job, prompts, ends) if ends else drawn(job, to_seed)
    frames_ = job.run(partial(interpolate, job.sd, prompts, noises, frames=frames))
    write_picture(gif, frames_[0], format="GIF", save_all=True, append_images=frames_[1:], duration=120, loop=0)
    job.write(frames_, together=make_strip, last=gif, gif=str(gif))


def inverted(job: "Job", prompts: tuple[str, str], ends: list[Any]) -> tuple["Tensor", "Tensor"]:
    """The noise of two pictures."""
    from minisd.tasks.images import mean_latents
    from minisd.tasks.inversion import invert
    from minisd.tasks.pictures import to_images

    images = to_images(ends, *job.size)
    *_, top = job.progress(invert(job.sd, list(prompts), mean_latents(job.sd, images), **job.settings))
    return top.latents[:1], top.latents[1:]


def drawn(job: "Job", to_seed: int | None) -> tuple["Tensor", "Tensor"]:
    """The noise of two seeds."""
    import torch

    from minisd.sampling import tell_seed

    seeds = job.seed, job.seed + 1 if to_seed is None else to_seed
    job.extra["to_seed"] = seeds[1]
    shape = (1, *job.sd.latent_shape(*job.size))
    tell_seed(seeds[1])
    one, other = (job.sd.initial_noise(shape, torch.Generator().manual_seed(seed), None) for seed in seeds)
    return one, other


@click.command(cls=PictureCommand)
@click.argument("prompt")
@options("output", "and", "weight", "weighted", "colour", "colour-scale", *GENERATION[1:])
def guide(
    prompt: str,
    others: tuple[str, ...],
    weight: float,
    weighted: bool,
    colour: str | None,
    colour_scale: float,
    **options: Any,
) -> None:
    """Generate from PROMPT under more guidance: other prompts, weighted words, a colour."""
    from minisd.cli.job import Job
    from minisd.tasks.guidance import LossGuidance, colour_loss, compose, parse_weights, weighted_context

    loss = colour_loss(colour) if colour is not None else None
    several = [text_and_number(other) for other in others]
    for text in (prompt, options["negative_prompt"], *(text for text, _ in several)) if weighted else ():
        parse_weights(text)  # before the model is loaded
    extra: dict[str, Any] = {"weighted": True} if weighted else {}
    extra |= {"and": "; ".join(others), "prompt_weight": weight} if others else {}
    extra |= {"colour": colour, "colour_scale": colour_scale} if colour is not None else {}
    job = Job.prepare(prompt, options, **extra)
    sd, long_prompts = job.sd, job.sampling.long_prompts

    def read(text: str) -> Any:
        return weighted_context(sd, text, job.sampling.clip_skip, long_prompts) if weighted else text

    predict_noise: Any = sd.predict_noise
    if several:
        predict_noise = compose(sd, [(read(text), share) for text, share in several], weight, long_prompts)
    if loss is not None:
        scheduler = job.sampling.scheduler
        predict_noise = LossGuidance(sd, loss, scale=colour_scale, scheduler=scheduler, predict_noise=predict_noise)
    given = {"negative_prompt": read(options["negative_prompt"]), "predict_noise": predict_noise}
    job.write(job.run(lambda **settings: sd.denoise(read(prompt), **{**settings, **given})))


COMMANDS = (generate, img2img, inpaint, invert, edit, p2p, schedule, interpolate, guide)
