"""Measure what the emoji model can do, and print it as a table.

    python scripts/evaluate_emoji.py                  # the model that ships with minisd
    python scripts/evaluate_emoji.py MODEL --card     # and write the table into the model's README.md

    python scripts/evaluate_emoji.py MODEL --sheet sheet.png   # sixty prompts, to look at

Seeds are from SEED on, which no picture of the training used. What is measured: emoji_measures.py; how an emoji is
recognised: recognition.py.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_data import EMOJI, FULL, RELATIONS, Studio, contact_sheet
from emoji_measures import (
    EDIT,
    SEED,
    Pair,
    Sampler,
    compositions,
    crispness,
    draw_pairs,
    edits,
    grounds,
    held_out,
    kid,
    places,
    recognised,
    share,
    sheet_prompts,
)
from PIL import Image
from recognition import Gallery
from torch import Tensor
from train_vae import TEST, Drawings, pictures

from minisd.checkpoint.hub import embedded_model
from minisd.pipeline import StableDiffusion
from minisd.schedulers import DDPMScheduler
from minisd.vae import VAE

GUIDANCES = (1.0, 2.0, 4.0, 7.5, 12.0)
STEPS = (5, 10, 20, 50, 100)
MARKS = ("<!-- measured by scripts/evaluate_emoji.py -->", "<!-- end of measurements -->")


def every_step(sd: StableDiffusion) -> DDPMScheduler:
    """DDPM over all timesteps, 999 to 0. (The offset of 1 that SD 1.5's schedule has would begin at 1000.)"""
    return DDPMScheduler.from_config(sd.config.scheduler, steps_offset=0)


# ---- autoencoder -----------------------------------------------------------------------------------------


@torch.no_grad()
def autoencoder(vae: VAE, studio: Studio, count: int) -> tuple[Tensor, Tensor]:
    """PSNR in decibels and SSIM of unseen compositions, each (count,)."""
    unseen = Drawings(studio, TEST, FULL, vae.config.sample_size, crowds=False)
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


@dataclass(frozen=True)
class Evaluation:
    """The parts of the table, each the lines of its rows. `few` names for the costly ones."""

    sampler: Sampler
    studio: Studio
    gallery: Gallery
    names: int
    few: int
    likeness: int

    @property
    def usual(self) -> str:
        best = self.sampler.sd.generation
        return f"DDIM {best['steps']}, guidance {best['guidance_scale']:g}"

    @property
    def characters(self) -> list[str]:
        return random.Random(SEED).sample(list(EMOJI), len(EMOJI))

    def row(self, what: str, settings: str, first: str, five: str = "") -> str:
        return f"| {what} | {settings} | {first} | {five} |"

    def named(self, settings: str, count: int, **changed: object) -> str:
        """How many of so many names are recognised."""
        first, five = recognised(self.sampler, self.gallery, self.characters[:count], **changed)
        return self.row("recognition", settings, share(first), share(five))

    def single(self) -> Iterator[str]:
        yield self.named(self.usual, self.names)
        yield self.row("ground", self.usual, share(grounds(self.sampler, self.characters[: self.few // 2])))
        yield self.row("place", self.usual, share(places(self.sampler, self.characters[: self.few])))

    def pairs(self) -> Iterator[str]:
        """All, and by how they stand and on what: what was asked, by first guess, and among five."""
        asked = draw_pairs(self.names)
        generated = self.sampler.generate([pair.prompt for pair in asked])
        kinds: dict[str, Callable[[Pair], bool]] = {
            "pair, both in place": lambda pair: True,
            "- side by side": lambda pair: RELATIONS[pair.relation][0] in ("on the left", "on the right"),
            "- above each other": lambda pair: RELATIONS[pair.relation][0] in ("at the top", "at the bottom"),
            "- on white": lambda pair: pair.ground == "white",
            "- on a coloured ground": lambda pair: pair.ground != "white",
        }
        for what, belongs in kinds.items():
            some = [(pair, picture) for pair, picture in zip(asked, generated, strict=True) if belongs(pair)]
            first, five = (share(pair.is_in(picture, self.gallery, n) for pair, picture in some) for n in (1, 5))
            yield self.row(what, self.usual, first, five)

    def held_out(self) -> Iterator[str]:
        hits = held_out(self.sampler, self.gallery, self.names // 2)
        yield self.row("held-out thing, ground and place", self.usual, share(hits))

    def edits(self) -> Iterator[str]:
        done, rest = edits(self.sampler, self.gallery, self.studio, 3 * self.few)
        settings = f"DDIM {self.sampler.sd.generation['steps']}, guidance {EDIT['guidance_scale']:g}"
        yield self.row("edit done, the rest kept", settings, share(done))
        yield self.row("edit, PSNR of the rest", settings, f"{sum(rest) / len(rest):.1f} dB")

    def likenesses(self) -> Iterator[str]:
        captions, drawn = compositions(self.studio, self.sampler.sd.vae.config.sample_size, self.likeness)
        generated = self.sampler.generate(captions)
        mean, deviation = kid(generated, drawn)
        what = "KID to drawings of the same captions"
        yield self.row(what, f"{self.usual}, {self.likeness} each", f"{mean:.4f} ± {deviation:.4f}")
        yield self.row("crispness, drawings = 1", self.usual, f"{crispness(generated) / crispness(drawn):.3f}")

    def settings(self) -> Iterator[str]:
        """Recognition against guidance and steps."""
        steps, sd = self.sampler.sd.generation["steps"], self.sampler.sd
        for scale in GUIDANCES:
            yield self.named(f"DDIM {steps}, guidance {scale:g}", 2 * self.few, guidance_scale=scale)
        for count in STEPS:
            yield self.named(f"DDIM {count}", 2 * self.few, steps=count)
        yield self.named("DDPM 1000", self.few // 2, steps=1000, scheduler=every_step(sd))

    def vae(self) -> Iterator[str]:
        count = 10 * self.few
        measured = autoencoder(self.sampler.sd.vae, self.studio, count)
        for what, values, unit in zip(("VAE, PSNR", "VAE, SSIM"), measured, (" dB", ""), strict=True):
            worst = values.sort().values[: max(1, count // 20)].mean()
            yield self.row(
                what, f"{count} unseen compositions", f"{values.mean():.4g}{unit}, worst 5 % {worst:.4g}{unit}"
            )


PARTS = ("single", "pairs", "held_out", "edits", "likenesses", "settings", "vae")


def table(evaluation: Evaluation, parts: Sequence[str]) -> Iterator[str]:
    """The lines of the table, each as soon as it is measured."""
    yield "| what | settings | measured | top-5 |"
    yield "|---|---|---|---|"
    for part in parts:
        yield from getattr(evaluation, part)()


def sheet(sampler: Sampler) -> Image.Image:
    """Sixty prompts and their pictures, for the eye."""
    prompts = sheet_prompts()
    return contact_sheet(sampler.generate(prompts), prompts, 12)


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
    parser.add_argument("--names", type=int, default=200, help="names, and pairs; half as many held out (default 200)")
    parser.add_argument("--few", type=int, default=20, help="names in the costly rows (default 20)")
    parser.add_argument("--likeness", type=int, default=500, help="pictures to compare with drawings (default 500)")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts of the table")
    parser.add_argument("--sheet", type=Path, metavar="OUT.png", help="only generate sixty prompts to look at")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in its usual place")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sd, started, lines = StableDiffusion.load(arguments.model, device=device), time.perf_counter(), []
    if arguments.sheet:
        sheet(Sampler(sd, arguments.batch)).save(arguments.sheet)
        return
    studio = Studio(arguments.font)
    gallery, sizes = (
        Gallery.draw(studio, sd.vae.config.sample_size),
        (arguments.names, arguments.few, arguments.likeness),
    )
    evaluation = Evaluation(Sampler(sd, arguments.batch), studio, gallery, *sizes)
    for line in table(evaluation, arguments.only or PARTS):
        print(line, flush=True)
        lines.append(line)
    print(f"{(time.perf_counter() - started) / 60:.0f} minutes")
    if arguments.card:
        write_card(Path(arguments.model) / "README.md", lines)


if __name__ == "__main__":
    main()
