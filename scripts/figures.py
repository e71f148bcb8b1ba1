"""Make every picture that the README and the model card show, from the model that ships with minisd.

python scripts/figures.py              # all of them, into weights/figures/
python scripts/figures.py guidance     # one
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from emoji_data import Figure, Scene, Studio, contact_sheet
from evaluate_emoji import GUIDANCES, STEPS, every_step
from page import run_section
from PIL import Image

from minisd.pipeline import StableDiffusion, to_pictures
from minisd.schedulers import NAMES
from minisd.tasks import (
    LossGuidance,
    colour_loss,
    compose,
    edit,
    finish,
    image_to_image,
    inpaint,
    interpolate,
    invert,
    mean_latents,
    round_trip,
    to_images,
)
from minisd.tasks.schedule import as_picture

FOLDER = Path(__file__).parents[1] / "weights" / "figures"
SEED = 1
COLUMNS = 8
SAMPLES = """
    red heart; a sun; pizza; a panda; a rocket; a mushroom; an umbrella; rainbow;
    a red heart on a blue background; a fox on a purple background; a ghost on a black background;
    a sunflower on an orange background; a penguin on a pink background; a cactus on a yellow background;
    strawberry on a green background; a robot on a red background;
    a small star; a large tomato; a snowman on the left; a balloon at the top; a car at the bottom;
    a cat and a dog; a yellow star and a moon; a blue heart and a green apple on a black background
"""
ROWS = ("a strawberry", "a penguin on a pink background", "a rocket", "a house on a green background")


def generate(sd: StableDiffusion, prompts: list[str], **settings: object) -> list[Image.Image]:
    """One picture a prompt, the n-th from seed SEED + n, at the model's best settings but for `settings`."""
    generators = [torch.Generator().manual_seed(SEED + number) for number in range(len(prompts))]
    return sd.text_to_image(prompts, generator=generators, **{**sd.generation, **settings})


def samples(sd: StableDiffusion) -> Image.Image:
    """Prompts that people would try."""
    prompts = [" ".join(prompt.split()) for prompt in SAMPLES.split(";")]
    return contact_sheet(generate(sd, prompts), prompts, COLUMNS)


def guidance(sd: StableDiffusion) -> Image.Image:
    """A row for each prompt, from no guidance to far too much."""
    return grid([(f"guidance {g:g}", generate(sd, list(ROWS), guidance_scale=g)) for g in GUIDANCES])


def steps(sd: StableDiffusion) -> Image.Image:
    """A row for each prompt, from five steps of DDIM to the thousand of DDPM."""
    columns = [(f"DDIM, {n} steps", generate(sd, list(ROWS), steps=n)) for n in STEPS]
    return grid([*columns, ("DDPM, 1000 steps", generate(sd, list(ROWS), steps=1000, scheduler=every_step(sd)))])


def grid(columns: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Columns under one label each, beside one another."""
    labels, generated = zip(*columns, strict=True)
    cells = [
        (picture, label) for row in zip(*generated, strict=True) for picture, label in zip(row, labels, strict=True)
    ]
    return contact_sheet([picture for picture, _ in cells], [label for _, label in cells], len(columns))


# ---- tasks -----------------------------------------------------------------------------------------------


def one(sd: StableDiffusion, prompt: str, seed: int = SEED, **settings: object) -> Image.Image:
    """One picture at the model's best settings but for `settings`."""
    return sd.text_to_image(prompt, seed=seed, **{**sd.generation, **settings})[0]


def img2img(sd: StableDiffusion) -> Image.Image:
    """A picture, changed by and by."""
    picture = one(sd, "orange on a blue background")
    strengths = (0.3, 0.5, 0.7, 0.9)
    prompt = "a tomato on a blue background"
    generated = [
        finish(sd, image_to_image(sd, prompt, picture, strength=s, seed=SEED, **sd.generation))[0] for s in strengths
    ]
    return contact_sheet([picture, *generated], ["the picture", *(f"strength {s}" for s in strengths)], 5)


def inpaint_figure(sd: StableDiffusion) -> Image.Image:
    """Half of a picture, generated anew three times."""
    picture = one(sd, "a mushroom and a star on a blue background")
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (picture.width // 2, 0, picture.width, picture.height))
    prompts = [f"a mushroom and a {thing} on a blue background" for thing in ("red heart", "tree", "lemon")]
    generated = [finish(sd, inpaint(sd, prompt, picture, mask, seed=SEED, **sd.generation))[0] for prompt in prompts]
    return contact_sheet([picture, mask.convert("RGB"), *generated], ["the picture", "the mask", *prompts], 5)


def inversion(sd: StableDiffusion) -> Image.Image:
    """A picture that the model never saw, up to noise and down again under strong guidance; then with other words."""
    size = sd.vae.config.sample_size
    figures = (
        Figure(character="🍎", height=0.6, x=0.32, y=0.36),
        Figure(character="⭐", height=0.42, x=0.72, y=0.68),
    )
    picture = Studio().draw(Scene(figures=figures, ground="blue"), size)
    prompt = "an apple and a star on a blue background"
    latents = mean_latents(sd, to_images([picture], size, size))
    settings: dict[str, Any] = {"steps": 50, "guidance_scale": 7.5}
    back = [
        round_trip(sd, prompt, latents, [picture], invert(sd, prompt, latents, exact=way, **settings), **settings)
        for way in (False, True)
    ]
    apple = Studio().draw(Scene(figures=(replace(figures[0], height=0.7, x=0.45, y=0.55),), ground="blue"), size)
    words = "an apple on a blue background"
    start = mean_latents(sd, to_images([apple], size, size))
    usual = {**sd.generation, "guidance_scale": 2.0}  # and a tenth of the steps: what `minisd edit` takes by itself
    first = usual["steps"] // 10
    edited = finish(sd, edit(sd, words, words.replace("blue", "yellow"), start, start=first, **usual))[0]
    labels = [
        "the picture",
        f"through the VAE: {back[0].limit[0]:.1f} dB",
        f"plain inversion, guidance 7.5: {back[0].psnr[0]:.1f} dB",
        f"exact inversion, guidance 7.5: {back[1].psnr[0]:.1f} dB",
        "another picture",
        "edited: on a yellow background",
    ]
    alone = to_pictures(sd.decode(latents))[0]
    return contact_sheet([picture, alone, back[0].pictures[0], back[1].pictures[0], apple, edited], labels, 6)


def interpolation(sd: StableDiffusion) -> Image.Image:
    """From one prompt and seed to another."""
    shape = (1, *sd.latent_shape(None, None))
    first, last = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (SEED, SEED + 1))
    prompts = ("a green apple", "a tomato on a yellow background")
    generated = finish(sd, interpolate(sd, prompts, (first, last), frames=7, **sd.generation))
    return contact_sheet(generated, [prompts[0], *[""] * 5, prompts[1]], 7)


def guided(sd: StableDiffusion) -> Image.Image:
    """What can stand beside the prompt: a colour, another prompt."""
    blue = LossGuidance(sd, colour_loss("blue"), scale=4.0)
    half = compose(sd, [("red heart", 0.5)], weight=0.5)
    pictures = [
        one(sd, "house"),
        one(sd, "house", predict_noise=blue),
        one(sd, "sun"),
        one(sd, "sun", predict_noise=half),
    ]
    labels = ["house", "house, pulled to blue", "sun", "half sun, half red heart"]
    return contact_sheet(pictures, labels, 4)


def surgery(sd: StableDiffusion) -> Image.Image:
    """What the README's experiments on the weights do."""
    own = [sd.text_to_image(prompt, steps=20, guidance_scale=4.0, seed=4)[0] for prompt in ("cat face", "red heart")]
    with TemporaryDirectory() as folder:
        made = run_section("minisd/lab/weights/README.md", "Surgery", Path(folder))
    labels = ["cat face", "a head silent", "red heart", "two blocks swapped", "a rounded VAE"]
    return contact_sheet([own[0], made["silent"], own[1], made["swapped"], made["rounded"]], labels, 5)


def schedule(sd: StableDiffusion) -> Image.Image:
    """The model's noise schedule."""
    return as_picture(sd.make_scheduler("ddim"), 10)


def schedulers(sd: StableDiffusion) -> Image.Image:
    """The same prompt and seed in 5, 10 and 20 steps by each scheduler."""
    prompt, counts = "a mushroom on a blue background", (5, 10, 20)
    names = [name for name in NAMES if name != "lcm"]  # made for distilled models, which this one is not
    pictures = [
        sd.text_to_image(prompt, steps=steps, guidance_scale=4.0, seed=SEED, scheduler=name)[0]
        for steps in counts
        for name in names
    ]
    return contact_sheet(pictures, [f"{name}, {steps}" for steps in counts for name in names], len(names))


FIGURES: dict[str, Callable[[StableDiffusion], Image.Image]] = {
    "samples": samples,
    "guidance": guidance,
    "steps": steps,
    "img2img": img2img,
    "inpaint": inpaint_figure,
    "inversion": inversion,
    "interpolation": interpolation,
    "guided": guided,
    "surgery": surgery,
    "schedule": schedule,
    "schedulers": schedulers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of the README and the model card.")
    parser.add_argument("names", nargs="*", choices=[*FIGURES, []], help=f"which: {', '.join(FIGURES)} (default: all)")
    names = parser.parse_args().names or list(FIGURES)
    sd = StableDiffusion.load()
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        path = FOLDER / f"{name}.png"
        FIGURES[name](sd).save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
