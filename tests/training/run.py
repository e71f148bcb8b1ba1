"""A training run small enough for a test, as one process or under torchrun:
run.py vae|text|v|classes FOLDER STEPS [STOP]

STOP: leave without a word after that step's checkpoint, as a machine does that is switched off.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from emoji_data import FULL, draw_scene
from latent_bank import Bank
from train_class_conditional import train as train_classes
from train_text_to_image import Denoiser, chosen_schedule
from train_text_to_image import train as train_text
from train_vae import train as train_vae
from training import gather_team

from minisd.checkpoint.hub import embedded_model
from minisd.checkpoint.load import load_tokenizer
from minisd.pipeline import StableDiffusion

BATCH = 4


class Blots:
    """Pictures without a font: smooth random colours (3, 32, 32)."""

    def __getitem__(self, index: int) -> np.ndarray:
        coarse = np.random.default_rng(index).uniform(-1, 1, (3, 4, 4)).astype(np.float32)
        return coarse.repeat(8, axis=1).repeat(8, axis=2)


def main(kind: str, folder: Path, steps: int, stop: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def show(_: object, step: int) -> None:
        if step == stop:
            os._exit(0)

    with gather_team() as team:
        if kind == "classes":
            pictures = torch.randint(0, 256, (20, 1, 32, 32), generator=torch.Generator().manual_seed(1))
            settings = Namespace(start=None, steps=steps, batch=BATCH, lr=1e-3, save_every=3)
            train_classes(team, folder, (pictures.to(torch.uint8), torch.arange(20) % 10), settings, show)
        elif kind in ("text", "v"):
            mean = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(1))
            bank = Bank([draw_scene(0, index, FULL) for index in range(16)], mean, torch.full_like(mean, 0.1))
            words = load_tokenizer(embedded_model() / "tokenizer")
            settings = {"steps": steps, "batch": BATCH, "peak": 1e-3, "save_every": 3, "show": show}
            schedule = chosen_schedule("v_prediction", True) if kind == "v" else chosen_schedule("epsilon", False)
            train_text(team, folder, bank, words, Denoiser(), schedule=schedule, **settings)
        else:
            vae = StableDiffusion.load().vae.train().requires_grad_(True)
            settings = {"steps": steps, "batch": BATCH, "peak": 1e-3, "save_every": 3, "workers": 0, "show": show}
            train_vae(team, folder, Blots(), vae, **settings)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
