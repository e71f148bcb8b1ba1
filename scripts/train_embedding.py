"""Teach the emoji model a word, from pictures, in two minutes: textual inversion.

    python scripts/train_embedding.py 🐙 "<thing>" --out thing.safetensors
    minisd generate "a <thing> on a blue background" --embedding thing.safetensors

Nothing of the model changes. Only the new word's rows in the text encoder's table are learned, so that the word makes
the model predict the noise in the pictures (Gal et al. 2022, arXiv:2208.01618). What the model cannot generate no word
can make it generate: the pictures here show an emoji that it knows, but it is never told its name. (For a thing that is
new see `train_lora.py`.) diffusers loads the file too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from emoji_data import EMOJI, Studio, contact_sheet
from latent_bank import Bank, draw_batch, encode
from recognition import Gallery
from torch import Tensor
from tqdm import tqdm
from train_lora import generate, recognised, scenes_of
from train_text_to_image import Denoiser, learn
from training import learning_rate

from minisd.adapters.writing import write_embedding
from minisd.config import SD15
from minisd.pipeline import StableDiffusion
from minisd.schedulers import DDPMScheduler

SEED = 0
PLACES = ("on a blue background", "on a pink background", "on black", "on the left", "on the right", "at the top")


def first_vectors(sd: StableDiffusion, count: int) -> Tensor:
    """Where the search begins: rows that are like the table's, but no word's."""
    table = sd.text_encoder.token_embedding.weight.detach()
    noise = torch.randn(count, table.shape[1], generator=torch.Generator().manual_seed(SEED))
    return table.mean(dim=0) + table.std(dim=0) * noise


def train(sd: StableDiffusion, bank: Bank, word: str, *, steps: int, batch: int, peak: float) -> list[float]:
    """Train the rows of `word`, which is loaded already and has them in the end. Returns the losses."""
    denoiser = Denoiser()
    denoiser.text_encoder, denoiser.unet = sd.text_encoder.requires_grad_(False), sd.unet.requires_grad_(False)
    rows = slice(-len(sd.adapters.embeddings[word]), None)
    table = sd.text_encoder.token_embedding.weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([table], lr=peak, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler, losses = DDPMScheduler.from_config(SD15.scheduler), []
    for step in (bar := tqdm(range(steps), unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak, warmup=10, total=steps)
        optimizer.zero_grad()
        losses.append(learn(denoiser, draw_batch(bank, sd.tokenizer, batch, step), scheduler).item())
        assert table.grad is not None
        table.grad[: rows.start] = 0  # Adam does not move what never had a gradient
        optimizer.step()
        bar.set_postfix_str(f"loss {losses[-1]:.4f}", refresh=False)
    sd.adapters.embeddings[word] = table.requires_grad_(False)[rows].clone()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn a word for an emoji from its pictures alone.")
    parser.add_argument("character", help="an emoji that the model can generate, such as 🐙")
    parser.add_argument("word", help="the new word, such as '<thing>'")
    parser.add_argument("--out", type=Path, default=Path("embedding.safetensors"), metavar="FILE")
    parser.add_argument("--sheet", type=Path, metavar="OUT.png", help="pictures without it, and with it")
    parser.add_argument("--vectors", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-2)
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in its usual place")
    arguments = parser.parse_args()
    word, studio = arguments.word, Studio(arguments.font)
    sd, gallery = StableDiffusion.load(), Gallery.draw(studio, 128)
    EMOJI[arguments.character] = (word,)  # captions shall call it so, and never by its names
    sd.load_embedding(first_vectors(sd, arguments.vectors), word)
    prompts = [word, *(f"{word} {where}" for where in PLACES)]
    before = generate(sd, prompts)
    scenes = scenes_of(arguments.character, 128)
    bank = Bank(scenes, *encode(scenes, sd.vae, studio))
    train(sd, bank, word, steps=arguments.steps, batch=arguments.batch, peak=arguments.lr)
    path = write_embedding(arguments.out, word, sd.adapters.embeddings[word])
    after = generate(sd, prompts)
    for when, pictures in (("before", before), ("after", after)):
        seen = recognised(pictures, [arguments.character] * len(prompts), gallery)
        print(f"{when}: the emoji is recognised in {seen} pictures of {word}")
    if arguments.sheet:
        contact_sheet([*before, *after], prompts * 2, columns=len(prompts)).save(arguments.sheet)
    print(path)


if __name__ == "__main__":
    main()
