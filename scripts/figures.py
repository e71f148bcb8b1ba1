"""Make every picture that the README and the model card show, from the model that ships with minisd.

python scripts/figures.py              # all of them, into weights/figures/
python scripts/figures.py guidance     # one
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from emoji_data import contact_sheet
from evaluate_emoji import GUIDANCES, STEPS, every_step
from PIL import Image

from minisd.pipeline import StableDiffusion

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


def paint(sd: StableDiffusion, prompts: list[str], **settings: object) -> list[Image.Image]:
    """One picture a prompt, the n-th from seed SEED + n, at the model's best settings but for `settings`."""
    generators = [torch.Generator().manual_seed(SEED + number) for number in range(len(prompts))]
    return sd.text_to_image(prompts, generator=generators, **{**sd.generation, **settings})


def samples(sd: StableDiffusion) -> Image.Image:
    """Prompts that people would try."""
    prompts = [" ".join(prompt.split()) for prompt in SAMPLES.split(";")]
    return contact_sheet(paint(sd, prompts), prompts, COLUMNS)


def guidance(sd: StableDiffusion) -> Image.Image:
    """A row for each prompt, from no guidance to far too much."""
    return grid([(f"guidance {g:g}", paint(sd, list(ROWS), guidance_scale=g)) for g in GUIDANCES])


def steps(sd: StableDiffusion) -> Image.Image:
    """A row for each prompt, from five steps of DDIM to the thousand of DDPM."""
    columns = [(f"DDIM, {n} steps", paint(sd, list(ROWS), steps=n)) for n in STEPS]
    return grid([*columns, ("DDPM, 1000 steps", paint(sd, list(ROWS), steps=1000, scheduler=every_step(sd)))])


def grid(columns: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Columns under one label each, beside one another."""
    labels, painted = zip(*columns, strict=True)
    cells = [(picture, label) for row in zip(*painted, strict=True) for picture, label in zip(row, labels, strict=True)]
    return contact_sheet([picture for picture, _ in cells], [label for _, label in cells], len(columns))


FIGURES: dict[str, Callable[[StableDiffusion], Image.Image]] = {
    "samples": samples,
    "guidance": guidance,
    "steps": steps,
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
