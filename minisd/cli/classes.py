"""The command that makes pictures without a prompt: `minisd classes`, on models of pixels.

Only click is imported here; what needs torch is imported when the command runs.
"""

from typing import TYPE_CHECKING, Any

import click

from minisd.cli.options import REPORT, PictureCommand, options

if TYPE_CHECKING:
    from minisd.pixel.pipeline import PixelDiffusion


@click.command(cls=PictureCommand)
@click.option("-m", "--model", default="fashion", show_default=True, help="fashion, a folder, or a hub id.")
@click.option("--class", "chosen", multiple=True, metavar="NAME", help="One class, by name or number; again for more.")
@click.option("--images", type=click.IntRange(1, 1000), default=8, show_default=True, help="Pictures of each class.")
@options(
    "output", "seed", "steps", "guidance", "scheduler", "eta", "colour", "colour-scale", "device", "dtype", *REPORT
)
def classes(model: str, chosen: tuple[str, ...], images: int, **options: Any) -> None:
    """Generate a sheet of pictures of each class, by a model of pixels.

    A model without classes makes a sheet of whatever it was trained on.
    """
    import secrets

    from tqdm import tqdm

    from minisd.cli.job import choose_device_and_dtype
    from minisd.cli.output import plan_paths, report, write_png
    from minisd.pipeline import to_pictures
    from minisd.pixel.pipeline import PixelDiffusion
    from minisd.pixel.sheet import sheet
    from minisd.tasks.guidance import LossGuidance, colour_loss

    loss = colour_loss(options["colour"]) if options["colour"] is not None else None
    seed = secrets.randbelow(2**32) if options["seed"] is None else options["seed"]
    path = plan_paths(options["output"], "classes", seed, 1).output
    device, dtype = choose_device_and_dtype(options)
    diffusion = PixelDiffusion.load(model, dtype=dtype, device=device)
    names = class_names(diffusion, chosen)
    labels = [label for label in names for _ in range(images)] or None
    settings = {name: options[name] for name in ("steps", "guidance_scale", "scheduler", "eta")}
    if loss is not None:
        scale, scheduler = options["colour_scale"], settings["scheduler"]
        plain = diffusion.predictor(settings["guidance_scale"], labels)
        settings["predict_noise"] = LossGuidance(diffusion, loss, scale=scale, scheduler=scheduler, predict_noise=plain)
    steps = diffusion.denoise(labels, images=images, seed=seed, **settings)
    total = settings["steps"] or diffusion.steps
    *_, last = tqdm(steps, total=total, unit="step", disable=options["quiet"] or None)
    told = {"model": model, "seed": seed, "steps": total, "scheduler": settings["scheduler"], "eta": settings["eta"]}
    told |= {"classes": list(names.values()), "images": images, "output": str(path)}
    text = ", ".join(f"{name}: {value}" for name, value in told.items() if name != "output")
    write_png(path, sheet(to_pictures(last.latents), list(names.values())), text)
    report([path], told, options["as_json"])


def class_names(model: "PixelDiffusion", chosen: tuple[str, ...]) -> dict[int, str]:
    """Label -> name of the classes chosen, or of all; {} for a model without. Raises ValueError for a strange one."""
    count = model.unet.config.classes or 0
    known: list[str] = list(model.generation.get("classes", map(str, range(count))))
    if not chosen:
        return dict(enumerate(known)) if count else {}
    found = {}
    for text in chosen:
        label = int(text) if text.isdecimal() else known.index(text) if text in known else -1
        if not 0 <= label < len(known):
            has = f"which has {', '.join(known)}" if known else "which has none"
            raise ValueError(f"{text!r} is no class of this model, {has}")
        found[label] = known[label]
    return found


COMMANDS = (classes,)
