"""How much of a picture comes back from noise: PSNR of plain and exact inversion against steps and guidance.

    python scripts/inversion_table.py                     # the whole table, in Markdown
    python scripts/inversion_table.py --steps 50 --guidance 7.5

The pictures were not trained on: emoji side by side, drawn here, and the two photographs of scikit-learn
(`sklearn.datasets.load_sample_images`; left out where scikit-learn is not installed), scaled to the model's size.
"limit" is the VAE alone: no inversion can come nearer on average. "missed" is the largest part of a step that no
latents reach, which the exact way keeps for the way down; "x_T only" does without it, and starts from the noise alone.
The errors are those of the latents, relative to their size.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from emoji_data import Studio
from PIL import Image

from minisd import StableDiffusion
from minisd.tasks import invert, mean_latents, psnr, round_trip, to_images
from minisd.tasks.images import decoded


def compositions(size: int) -> dict[str, Image.Image]:
    """Four emoji in a square on a coloured ground: unlike any training picture."""
    studio, found = Studio(), {}
    for name, characters, ground in (
        ("a red heart, a sun, a tree and a cat", "❤☀🌳🐱", "#ffe13c"),
        ("a star, a moon, an apple and a car", "⭐🌙🍎🚗", "#326ee6"),
    ):
        picture = Image.new("RGB", (size, size), ground)
        for place, character in enumerate(characters):
            emoji = studio.glyphs[character].resize((size // 2 - 4, size // 2 - 4), Image.Resampling.LANCZOS)
            picture.paste(emoji, (place % 2 * size // 2 + 2, place // 2 * size // 2 + 2), emoji)
        found[name] = picture
    return found


def photographs(size: int) -> dict[str, Image.Image]:
    """A temple and a flower: the middle squares of scikit-learn's sample images."""
    try:
        from sklearn.datasets import load_sample_images  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        print(f"no photographs: {error}", file=sys.stderr)
        return {}
    found = {}
    for name, pixels in zip(("a temple", "a flower"), load_sample_images().images, strict=True):
        picture = Image.fromarray(np.asarray(pixels))
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        found[name] = square.resize((size, size), Image.Resampling.LANCZOS)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0, 7.5])
    parser.add_argument("--only", choices=("emoji", "photographs"))
    args = parser.parse_args()
    sd = StableDiffusion.load(args.model)
    size = sd.vae.config.sample_size
    pictures = {} if args.only == "photographs" else compositions(size)
    pictures |= {} if args.only == "emoji" else photographs(size)

    print("| picture | guidance | steps | limit (VAE) | plain | exact | missed | x_T only | plain | exact | x_T only |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for prompt, picture in pictures.items():
        for guidance in args.guidance:
            for steps in args.steps:
                print(row(sd, prompt, picture, steps, guidance), flush=True)


def row(sd: StableDiffusion, prompt: str, picture: Image.Image, steps: int, guidance: float) -> str:
    """One line of the table: the same picture, up and down again in both ways."""
    latents = mean_latents(sd, to_images([picture], picture.height, picture.width))
    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance}
    plain, exact = (
        round_trip(sd, prompt, latents, [picture], invert(sd, prompt, latents, exact=way, **settings), **settings)
        for way in (False, True)
    )
    size: dict[str, Any] = {"height": picture.height, "width": picture.width}
    *_, bottom = sd.denoise(prompt, latents=exact.noise, **size, **settings)
    alone = psnr(decoded(sd, bottom.latents)[0], picture)
    numbers = f"{exact.limit[0]:.2f} | {plain.psnr[0]:.2f} | {exact.psnr[0]:.2f} | {exact.missed:.0e} | {alone:.2f}"
    error = float((bottom.latents - latents).norm() / latents.norm())
    errors = f"{plain.error:.0e} | {exact.error:.0e} | {error:.0e}"
    return f"| {prompt} | {guidance:g} | {steps} | {numbers} | {errors} |"


if __name__ == "__main__":
    main()
