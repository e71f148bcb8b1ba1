"""What the eye sees in the emoji model's pictures, as numbers: both things of a pair, what was never trained, edits,
likeness to the drawings.

Each measure takes a `Sampler` and a `Gallery` (recognition.py) and gives what was found, one truth value a picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product

import numpy as np
import torch
from emoji_data import (
    COLOURED,
    COUNTABLE,
    EMOJI,
    FULL,
    GROUNDS,
    PLACES,
    RELATIONS,
    SIZES,
    Figure,
    Scene,
    Studio,
    caption,
    draw_scene,
    is_held_out,
    on_ground,
)
from PIL import Image
from recognition import Gallery, centre, figure_mask, figure_of, half, nearest_ground, normalised
from torch import Tensor, nn
from tqdm import tqdm

from minisd.pipeline import StableDiffusion
from minisd.tasks import edit, finish, mean_latents, to_images

SEED = 1_000_000  # from here on no picture of the training has its seed
REST = 16.0  # decibels: what an edit was not asked to change stays at least so near
EDIT = {"guidance_scale": 2.0}  # what `minisd edit` takes by itself, from a tenth of the steps


@dataclass(frozen=True)
class Sampler:
    """Generates prompts in batches, each from a seed of its own, at the model's settings but for those given."""

    sd: StableDiffusion
    batch: int

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
    """`92.5 ± 4.2 % of 40`: with the standard error of a share."""
    marks = list(hits)
    if not marks:
        return "none"
    found = sum(marks) / len(marks)
    return f"{100 * found:.1f} ± {100 * math.sqrt(found * (1 - found) / len(marks)):.1f} % of {len(marks)}"


# ---- one thing, two things -------------------------------------------------------------------------------


def recognised(
    sampler: Sampler, gallery: Gallery, characters: Sequence[str], **settings: object
) -> tuple[list[bool], list[bool]]:
    """Whether the first guess is the emoji whose name was generated, and whether one of the first five is."""
    generated = sampler.generate([EMOJI[c][0] for c in characters], **settings)
    rankings = [gallery.ranking(picture) for picture in generated]
    found = list(zip(characters, rankings, strict=True))
    return [c == ranking[0] for c, ranking in found], [c in ranking[:5] for c, ranking in found]


def grounds(sampler: Sampler, characters: Sequence[str]) -> list[bool]:
    """Whether the border has the colour that was asked for, over all grounds."""
    asked = [(EMOJI[c][0], ground) for c in characters for ground in GROUNDS]
    generated = sampler.generate([f"{name} {on_ground(ground)}" for name, ground in asked])
    return [nearest_ground(picture) == ground for picture, (_, ground) in zip(generated, asked, strict=True)]


def places(sampler: Sampler, characters: Sequence[str]) -> list[bool]:
    """Whether the figure's centre of mass is on the side that was named, away from the middle."""
    asked = [(EMOJI[c][0], place) for c in characters for place in PLACES if place]
    generated = sampler.generate([f"{name} {place}" for name, place in asked])
    return [is_at(place, *centre(picture)) for picture, (_, place) in zip(generated, asked, strict=True)]


def is_at(place: str, x: float, y: float) -> bool:
    """Beyond 0.1 from the middle, on the right side."""
    aim_x, aim_y = PLACES[place]
    return (x - 0.5) * (aim_x - 0.5) > 0.1 * abs(aim_x - 0.5) or (y - 0.5) * (aim_y - 0.5) > 0.1 * abs(aim_y - 0.5)


@dataclass(frozen=True)
class Pair:
    """`a X above a Y on a blue background`."""

    characters: tuple[str, str]
    relation: str
    ground: str

    @property
    def prompt(self) -> str:
        first, second = (f"a {EMOJI[character][0]}" for character in self.characters)
        return f"{first} {self.relation} {second}" + (f" {on_ground(self.ground)}" if self.ground != "white" else "")

    def is_in(self, picture: Image.Image, gallery: Gallery, guesses: int) -> bool:
        """Whether both are recognised, each in its half, within so many guesses."""
        halves = [half(picture, place) for place in RELATIONS[self.relation]]
        rankings = [gallery.ranking(part)[:guesses] for part in halves]
        return all(character in ranking for character, ranking in zip(self.characters, rankings, strict=True))


def draw_pairs(count: int) -> list[Pair]:
    """Pairs of countable things in all relations, every second one on a coloured ground."""
    rng = random.Random(SEED)
    found = []
    for number, relation in zip(range(count), cycle(RELATIONS), strict=False):
        first, second = rng.sample(COUNTABLE, 2)
        found.append(Pair((first, second), relation, rng.choice(COLOURED) if number // len(RELATIONS) % 2 else "white"))
    return found


# ---- what was held out, and what is changed --------------------------------------------------------------


def held_out(sampler: Sampler, gallery: Gallery, count: int) -> list[bool]:
    """Combinations of thing, ground and place that no training picture had: whether all three are as asked."""
    every = [combination for combination in product(EMOJI, GROUNDS, PLACES) if is_held_out(*combination)]
    asked = random.Random(SEED).sample(every, count)
    generated = sampler.generate([f"{EMOJI[c][0]} {place} {on_ground(ground)}" for c, ground, place in asked])
    return [
        gallery.ranking(picture)[0] == c and nearest_ground(picture) == ground and is_at(place, *centre(picture))
        for picture, (c, ground, place) in zip(generated, asked, strict=True)
    ]


@dataclass(frozen=True)
class Edit:
    """A drawing, and one thing to change about it: its ground, the thing itself, or its size."""

    before: Scene
    after: Scene

    def prompts(self) -> tuple[str, str]:
        rng = random.Random(0)
        return caption(self.before, rng), caption(self.after, rng)

    def is_done(self, source: Image.Image, edited: Image.Image, gallery: Gallery) -> bool:
        """The asked thing, on the asked ground, of the asked size."""
        (figure,), ranking = self.after.figures, gallery.ranking(edited)
        same = figure.character == ranking[0] and nearest_ground(edited) == self.after.ground
        smaller = figure_mask(np.asarray(edited)).mean() < 0.6 * figure_mask(np.asarray(source)).mean()
        return same and (smaller or not figure.size)

    def kept(self, source: Image.Image, edited: Image.Image) -> float:
        """PSNR in decibels of what had to stay: the figure where the ground changes, else the ground around both."""
        one, other = (np.asarray(picture, dtype=float) for picture in (source, edited))
        mask = figure_mask(one)
        stays = mask if self.before.ground != self.after.ground else ~(mask | figure_mask(other))
        error = np.square(one - other)[stays].mean() if stays.any() else np.inf
        return float(10 * np.log10(255**2 / max(error, 1e-9)))


def draw_edits(count: int) -> list[Edit]:
    """As many of the ground as of the thing and of the size."""
    rng = random.Random(SEED)
    found = []
    for number in range(count):
        thing, other = rng.sample(COUNTABLE, 2)
        ground, another = rng.sample(COLOURED, 2)
        figure = Figure(character=thing, height=SIZES[""], x=0.5, y=0.5)
        before = Scene(figures=(figure,), ground=ground)
        changed = (
            replace(before, ground=another),
            replace(before, figures=(replace(figure, character=other),)),
            replace(before, figures=(replace(figure, size="small", height=SIZES["small"]),)),
        )
        found.append(Edit(before, changed[number % 3]))
    return found


def edits(sampler: Sampler, gallery: Gallery, studio: Studio, count: int) -> tuple[list[bool], list[float]]:
    """Whether each edit shows what was asked and keeps the rest, and the PSNR of that rest."""
    sd, asked = sampler.sd, draw_edits(count)
    side = sd.vae.config.sample_size
    sources, edited = [studio.draw(one.before, side) for one in asked], []
    for start in tqdm(range(0, count, sampler.batch), desc="edits", leave=False):
        part = slice(start, start + sampler.batch)
        before, after = zip(*(one.prompts() for one in asked[part]), strict=True)
        latents = mean_latents(sd, to_images(sources[part], side, side))
        settings = {**sd.generation, **EDIT}
        steps = edit(sd, list(before), list(after), latents, start=settings["steps"] // 10, **settings)
        edited += finish(sd, steps)
    every = list(zip(asked, sources, edited, strict=True))
    rest = [one.kept(source, result) for one, source, result in every]
    done = [one.is_done(source, result, gallery) for one, source, result in every]
    return [is_done and kept >= REST for is_done, kept in zip(done, rest, strict=True)], rest


# ---- likeness to the drawings ----------------------------------------------------------------------------


class FigureFeatures(nn.Module):
    """What the recogniser sees of pictures (B, 3, H, W) uint8: (B, 3072), each of mean 0 and variance 1."""

    def forward(self, images: Tensor) -> Tensor:
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        seen = np.stack([normalised(figure_of(picture)) for picture in pictures])
        return torch.from_numpy(seen * math.sqrt(seen.shape[1]))


def kid(generated: Sequence[Image.Image], drawn: Sequence[Image.Image]) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018, arXiv:1801.01401) in `FigureFeatures`: mean and deviation."""
    from torchmetrics.image.kid import KernelInceptionDistance

    metric = KernelInceptionDistance(FigureFeatures(), subset_size=len(generated) // 2)
    for pictures, real in ((generated, False), (drawn, True)):
        metric.update(torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in pictures]), real=real)
    torch.manual_seed(0)  # it draws its subsets
    mean, deviation = metric.compute()
    return float(mean), float(deviation)


def crispness(pictures: Iterable[Image.Image]) -> float:
    """The mean difference of neighbouring pixels, 0 to 255, over pictures: less where edges are soft."""

    def of(pixels: np.ndarray) -> float:
        return float((np.abs(np.diff(pixels, axis=0)).mean() + np.abs(np.diff(pixels, axis=1)).mean()) / 2)

    return float(np.mean([of(np.asarray(picture, dtype=float)) for picture in pictures]))


def compositions(studio: Studio, side: int, count: int) -> tuple[list[str], list[Image.Image]]:
    """Captions and drawings of scenes that no training saw."""
    scenes = [draw_scene(SEED, index, FULL) for index in range(count)]
    captions = [caption(scene, random.Random(f"{SEED}/{index}")) for index, scene in enumerate(scenes)]
    return captions, [studio.draw(scene, side) for scene in scenes]


SHEET = """
    cat; pizza; red heart; sunflower; robot; house; owl; bicycle; strawberry; castle;
    a fox on a black background; an apple on a red background; a ghost on an orange background;
    a guitar on a yellow background; a blue book on a green background; a penguin on a blue background;
    a small star; a tiny key on blue; a large tomato; a big panda on a pink background;
    a rocket on the left; a frog on the right; a cake at the top; a car at the bottom;
    a dog on the left on a green background; a bell at the top on a purple background; a bee on the right on red;
    a cat and a dog; a cat and a dog on a green background; a red heart and a blue heart; a sun and a moon on black;
    a lion and a tiger; a pizza and a hamburger on a yellow background; a star above a tree; a balloon above a house;
    a cat above a dog; a fish below a sailboat; a mouse below an elephant on pink; a key below a lock;
    a car left of a bus; a carrot left of a rabbit on orange; a train right of a house; a dog to the right of a cat;
    an apple next to a banana; a rose next to a tulip on purple; a bird over a castle; a fire under a rocket;
    a small mouse and a large cat; a large elephant and a small bee; a small moon above a large tree;
    two cats; two apples on a blue background; two small stars;
    picture of a dog; A RED CAR; an image of an umbrella on yellow; a drawing of a butterfly; aubergine;
    a lorry on a white background; a cat without a dog
"""


def sheet_prompts() -> list[str]:
    """Sixty prompts that a person looks at: names, grounds, sizes, places, pairs, relations, other wordings."""
    return [" ".join(prompt.split()) for prompt in SHEET.split(";")]
