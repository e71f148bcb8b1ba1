"""Measure what the emoji model can do, and print it as a table.

    python scripts/evaluate_emoji.py                  # the model that ships with minisd
    python scripts/evaluate_emoji.py MODEL --card     # and write the table into the model's README.md

Seeds are from SEED on, which no picture of the training used. How an emoji is recognised: recognition.py.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_data import EMOJI, FULL, GROUNDS, PLACES, PLURAL, UNCOUNTED, Studio
from PIL import Image
from recognition import Gallery, centre, halves, nearest_ground
from torch import Tensor
from tqdm import tqdm
from train_vae import TEST, Drawings, pictures

from minisd.checkpoint.hub import embedded_model
from minisd.pipeline import StableDiffusion
from minisd.schedulers import DDPMScheduler
from minisd.vae import VAE

SEED = 1_000_000
GUIDANCES = (1.0, 2.0, 4.0, 7.5, 12.0)
STEPS = (5, 10, 20, 50, 100)
MARKS = ("<!-- measured by scripts/evaluate_emoji.py -->", "<!-- end of measurements -->")


class Sampler:
    """Paints prompts in batches, each with a seed of its own, and remembers how long that took."""

    def __init__(self, sd: StableDiffusion, batch: int) -> None:
        self.sd, self.batch = sd, batch

    def generate(self, prompts: Sequence[str], **settings: object) -> list[Image.Image]:
        """One picture a prompt."""
        chosen = {**self.sd.generation, **settings}
        generated: list[Image.Image] = []
        for start in tqdm(range(0, len(prompts), self.batch), desc=", ".join(settings) or "best", leave=False):
            part = list(prompts[start : start + self.batch])
            generators = [torch.Generator().manual_seed(SEED + start + i) for i in range(len(part))]
            generated += self.sd.text_to_image(part, generator=generators, **chosen)
        return generated


def share(hits: Iterable[bool]) -> str:
    """`92.5 % of 40`."""
    marks = list(hits)
    return f"{100 * sum(marks) / len(marks):.1f} % of {len(marks)}"


def every_step(sd: StableDiffusion) -> DDPMScheduler:
    """DDPM over all timesteps, 999 to 0. (The offset of 1 that SD 1.5's schedule has would begin at 1000.)"""
    return DDPMScheduler.from_config(sd.config.scheduler, steps_offset=0)


# ---- text ------------------------------------------------------------------------------------------------


def recognition(sampler: Sampler, gallery: Gallery, characters: Sequence[str], **settings: object) -> tuple[str, str]:
    """How often the first, and one of the first five guesses, is the emoji whose name was generated."""
    generated = sampler.generate([EMOJI[c][0] for c in characters], **settings)
    rankings = [gallery.ranking(picture) for picture in generated]
    pairs = list(zip(characters, rankings, strict=True))
    return share(c == ranking[0] for c, ranking in pairs), share(c in ranking[:5] for c, ranking in pairs)


def grounds(sampler: Sampler, characters: Sequence[str]) -> str:
    """How often the border has the colour that was asked for, over all grounds."""
    asked = [(EMOJI[c][0], ground) for c in characters for ground in GROUNDS]
    generated = sampler.generate([f"{name} on a{'n' * (g == 'orange')} {g} background" for name, g in asked])
    return share(nearest_ground(picture) == ground for picture, (_, ground) in zip(generated, asked, strict=True))


def places(sampler: Sampler, characters: Sequence[str]) -> str:
    """How often the figure's centre of mass is on the side that was named, away from the middle."""
    asked = [(EMOJI[c][0], place) for c in characters for place in PLACES if place]
    generated = sampler.generate([f"{name} {place}" for name, place in asked])
    return share(_is_at(place, *centre(picture)) for picture, (_, place) in zip(generated, asked, strict=True))


def _is_at(place: str, x: float, y: float) -> bool:
    """Beyond 0.1 from the middle, on the right side."""
    aim_x, aim_y = PLACES[place]
    return (x - 0.5) * (aim_x - 0.5) > 0.1 * abs(aim_x - 0.5) or (y - 0.5) * (aim_y - 0.5) > 0.1 * abs(aim_y - 0.5)


def pairs(sampler: Sampler, gallery: Gallery, characters: Sequence[str]) -> tuple[str, str]:
    """How often both of "a X and a Y" are recognised, X left and Y right: by first guess, and among five."""
    asked = list(zip(characters[::2], characters[1::2], strict=False))
    generated = sampler.generate([f"a {EMOJI[left][0]} and a {EMOJI[right][0]}" for left, right in asked])
    rankings = [[gallery.ranking(half) for half in halves(picture)] for picture in generated]
    return tuple(
        share(a in ra[:n] and b in rb[:n] for (a, b), (ra, rb) in zip(asked, rankings, strict=True)) for n in (1, 5)
    )  # type: ignore[return-value]


# ---- autoencoder -----------------------------------------------------------------------------------------


@torch.no_grad()
def autoencoder(vae: VAE, studio: Studio, count: int) -> tuple[Tensor, Tensor]:
    """PSNR in decibels and SSIM of unseen compositions, each (count,)."""
    unseen = Drawings(studio, TEST, FULL, vae.config.sample_size)
    images = pictures(unseen, 0, count).to(vae.quant_conv.weight.device)
    decoded = torch.cat([vae.decode(vae.encode(part).mode()) for part in images.split(16)]).clamp(-1, 1)
    mse = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(mse).cpu(), ssim((decoded / 2 + 0.5).cpu(), (images / 2 + 0.5).cpu())


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pictures (B, C, H, W) in [0, 1] (Wang et al. 2004), with its Gaussian of 11 pixels."""
    x = torch.arange(11) - 5.0
    line = torch.exp(-(x**2) / (2 * 1.5**2))
    channels = a.shape[1]
    window = torch.outer(line, line).div(line.sum() ** 2).expand(channels, 1, 11, 11)

    def blur(image: Tensor) -> Tensor:
        return F.conv2d(image, window, groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(dim=(1, 2, 3))


# ---- the table -------------------------------------------------------------------------------------------


def table(sd: StableDiffusion, studio: Studio, *, names: int, few: int, batch: int) -> Iterable[str]:
    """The lines of the table, each as soon as it is measured. `few` names for the costly rows."""
    sampler, gallery = Sampler(sd, batch), Gallery.draw(studio, sd.vae.config.sample_size)
    characters = list(EMOJI)
    random.Random(SEED).shuffle(characters)
    best = sd.generation
    yield "| what | settings | measured | top-5 | aim |"
    yield "|---|---|---|---|---|"

    def row(what: str, settings: str, first: str, five: str = "", aim: str = "") -> str:
        return f"| {what} | {settings} | {first} | {five} | {aim} |"

    usual = f"DDIM {best['steps']}, guidance {best['guidance_scale']:g}"
    yield row("recognition", usual, *recognition(sampler, gallery, characters[:names]), "90 %, top-5 97 %")
    yield row("ground", usual, grounds(sampler, characters[: few // 2]), "", "98 %")
    yield row("place", usual, places(sampler, characters[:few]), "", "95 %")
    countable = [c for c in characters if EMOJI[c][0] not in PLURAL | UNCOUNTED]
    yield row("pair, X left and Y right", usual, *pairs(sampler, gallery, countable[: 3 * few]), "70 %")
    for guidance in GUIDANCES:
        found = recognition(sampler, gallery, characters[: 2 * few], guidance_scale=guidance)
        yield row("recognition", f"DDIM {best['steps']}, guidance {guidance:g}", *found)
    for steps in STEPS:
        yield row("recognition", f"DDIM {steps}", *recognition(sampler, gallery, characters[: 2 * few], steps=steps))
    found = recognition(sampler, gallery, characters[: few // 2], steps=1000, scheduler=every_step(sd))
    yield row("recognition", "DDPM 1000", *found)
    decibels, likeness = autoencoder(sd.vae, studio, 10 * few)
    unseen = f"{10 * few} unseen compositions"
    yield row("VAE, PSNR", unseen, f"{decibels.mean():.2f} dB, worst {decibels.min():.2f}", "", "28 dB")
    yield row("VAE, SSIM", unseen, f"{likeness.mean():.3f}, worst {likeness.min():.3f}")


def write_card(card: Path, lines: Sequence[str]) -> None:
    """Put the table between its marks in the model card."""
    text = card.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    card.write_text("\n".join([before + MARKS[0], "", *lines, "", MARKS[1]]) + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the emoji model.")
    parser.add_argument("model", nargs="?", default=str(embedded_model()), help="a folder (default: minisd's own)")
    parser.add_argument("--card", action="store_true", help="write the table into MODEL/README.md")
    parser.add_argument("--names", type=int, default=200, help="names to recognise (default 200)")
    parser.add_argument("--few", type=int, default=20, help="names in the costly rows (default 20)")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in its usual place")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sd, started, lines = StableDiffusion.load(arguments.model, device=device), time.perf_counter(), []
    for line in table(sd, Studio(arguments.font), names=arguments.names, few=arguments.few, batch=arguments.batch):
        print(line, flush=True)
        lines.append(line)
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes")
    if arguments.card:
        write_card(Path(arguments.model) / "README.md", lines)


if __name__ == "__main__":
    main()
