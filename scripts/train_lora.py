"""Teach the emoji model a thing that it has never seen, in two minutes: a LoRA.

    python scripts/train_lora.py 🦩 flamingo --out flamingo.safetensors
    minisd generate "a flamingo on a blue background" --lora flamingo.safetensors

The model stays as it is; two thin matrices beside each attention layer of the UNet learn to predict the noise in
pictures of the new thing (Hu et al. 2021, arXiv:2106.09685). Every third picture shows what the model knows already,
so that it forgets nothing. The file is in kohya's dialect: any program loads it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from emoji_data import EMOJI, FULL, Scene, Studio, contact_sheet, draw_scene
from latent_bank import Bank, draw_batch, encode
from PIL import Image
from recognition import Gallery
from torch import nn
from tqdm import tqdm
from train_text_to_image import Denoiser, learn
from training import learning_rate

from minisd.adapters.factors import Beside, LowRank
from minisd.adapters.targets import Target, targets
from minisd.adapters.writing import write_lora
from minisd.config import SD15
from minisd.pipeline import StableDiffusion
from minisd.schedulers import DDPMScheduler

SEED = 0
PLACES = ("", " on a blue background", " on a black background", " on the left")
OTHERS = {"🐱": "cat", "🍕": "pizza", "🚀": "rocket", "🌻": "sunflower", "🤖": "robot", "🍄": "mushroom"}

Factors = dict[Target, tuple[nn.Parameter, nn.Parameter]]


def scenes_of(character: str, count: int) -> list[Scene]:
    """Scenes as the model knows them, but the first figure of each is this emoji."""
    scenes = [draw_scene(SEED, index, FULL) for index in range(count)]
    figures = [(replace(scene.figures[0], character=character), *scene.figures[1:]) for scene in scenes]
    return [replace(scene, figures=chosen) for scene, chosen in zip(scenes, figures, strict=True)]


def new_factors(sd: StableDiffusion, rank: int) -> Factors:
    """Down random, up zero, for each attention layer of the UNet: at first a LoRA changes nothing."""
    torch.manual_seed(SEED)
    factors = {}
    for target in targets(sd.config):
        if target.component == "unet" and "attention" in target.minisd:
            out, width, *kernel = target.shape
            down = nn.Parameter(torch.randn(rank, width, *kernel) / width**0.5)
            factors[target] = down, nn.Parameter(torch.zeros(out, rank, *[1] * len(kernel)))
    return factors


def train(sd: StableDiffusion, bank: Bank, factors: Factors, *, steps: int, batch: int, peak: float) -> list[float]:
    """Train the factors, beside layers that do not move; returns the losses. Ends with the model as it was."""
    denoiser = Denoiser()
    denoiser.text_encoder, denoiser.unet = sd.text_encoder.requires_grad_(False), sd.unet.requires_grad_(False)
    layers = {target: sd.unet.get_submodule(target.minisd) for target in factors}
    beside = [layers[target].register_forward_hook(Beside(LowRank(*pair), 1.0)) for target, pair in factors.items()]
    parameters = [parameter for pair in factors.values() for parameter in pair]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler, losses = DDPMScheduler.from_config(SD15.scheduler), []
    for step in (bar := tqdm(range(steps), unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak, warmup=10, total=steps)
        optimizer.zero_grad()
        losses.append(learn(denoiser, draw_batch(bank, sd.tokenizer, batch, step), scheduler).item())
        optimizer.step()
        bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
    for hook in beside:
        hook.remove()
    return losses


def generate(sd: StableDiffusion, words: Sequence[str]) -> list[Image.Image]:
    """A picture of each, always from the same noise."""
    return sd.text_to_image([f"a {one}" for one in words], seed=SEED, **sd.generation)


def recognised(pictures: Sequence[Image.Image], characters: Sequence[str], gallery: Gallery) -> str:
    """In how many pictures the emoji is seen that should be there."""
    hits = [gallery.ranking(picture)[0] == one for picture, one in zip(pictures, characters, strict=True)]
    return f"{sum(hits)} of {len(hits)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a LoRA that knows one more emoji.")
    parser.add_argument("character", help="an emoji that the model does not know, such as 🦩")
    parser.add_argument("name", help="what it shall be called")
    parser.add_argument("--out", type=Path, default=Path("lora.safetensors"), metavar="FILE")
    parser.add_argument("--sheet", type=Path, metavar="OUT.png", help="pictures without it, and with it")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--lr", type=float, default=8e-3)
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in its usual place")
    arguments = parser.parse_args()
    EMOJI[arguments.character] = (arguments.name,)
    sd, studio = StableDiffusion.load(), Studio(arguments.font)
    words = [*(arguments.name + where for where in PLACES), *OTHERS.values()]
    before = generate(sd, words)
    known = [draw_scene(SEED, index, FULL) for index in range(128)]
    scenes = known + scenes_of(arguments.character, 256)
    bank, factors = Bank(scenes, *encode(scenes, sd.vae, studio)), new_factors(sd, arguments.rank)
    train(sd, bank, factors, steps=arguments.steps, batch=arguments.batch, peak=arguments.lr)
    path = write_lora(arguments.out, factors, metadata={"ss_network_dim": str(arguments.rank)})
    sd.load_lora(path)
    after, gallery, new = generate(sd, words), Gallery.draw(studio, 128), len(PLACES)
    for when, pictures in (("before", before), ("after", after)):
        seen = recognised(pictures[:new], [arguments.character] * new, gallery)
        others = recognised(pictures[new:], list(OTHERS), gallery)
        print(f"{when}: {arguments.name} recognised in {seen} pictures, other things in {others}")
    if arguments.sheet:
        contact_sheet([*before, *after], words * 2, columns=len(words)).save(arguments.sheet)
    print(path)


if __name__ == "__main__":
    main()
