"""How many generated pictures of clothes a classifier of real ones takes for what was asked.

    python scripts/classify_fashion.py --model weights/fashion --count 1000

The classifier is a small convolutional network. It comes from the file given by `--classifier`, and is trained on the
real pictures first where there is no such file (five epochs, two minutes on one core).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion_data import CLASSES, FOLDER, as_input, read_fashion
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import trange

from minisd.batch.features import small_classifier
from minisd.pixel.pipeline import PixelDiffusion

SEED, BATCH, EPOCHS = 0, 100, 5


def train_classifier(data: Path) -> nn.Sequential:
    """Five epochs on the 60,000 real pictures, with shifts of up to two pixels."""
    torch.manual_seed(SEED)
    pictures, labels = read_fashion(data, "train")
    model, steps = small_classifier(len(CLASSES)), EPOCHS * len(pictures) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in trange(steps, desc="classifier"):
        chosen = torch.randint(len(pictures), (BATCH,))
        shifted = torch.roll(as_input(pictures[chosen]), torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))
        optimizer.zero_grad()
        F.cross_entropy(model(shifted), labels[chosen]).backward()
        optimizer.step()
        rate.step()
    return model.eval()


@torch.no_grad()
def accuracy(classifier: nn.Module, pictures: Tensor, labels: Tensor) -> list[float]:
    """The share of each class that is classified as labelled; pictures (N, 1, 32, 32) in [-1, 1]."""
    right = torch.cat([classifier(part).argmax(1) for part in pictures.split(BATCH)]) == labels
    return [right[labels == label].float().mean().item() for label in range(len(CLASSES))]


def generate(model: PixelDiffusion, count: int, **settings: Any) -> tuple[Tensor, Tensor]:
    """`count` pictures (N, 1, 32, 32) in [-1, 1], the classes in turn, and their labels."""
    labels, found = torch.arange(count) % len(CLASSES), []
    for first in trange(0, count, BATCH, desc="pictures"):
        part = labels[first : first + BATCH].tolist()
        *_, last = model.denoise(part, seed=SEED + first, **settings)
        found.append(last.latents.clamp(-1, 1))
    return torch.cat(found), labels


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Classify generated pictures of clothes.")
    parser.add_argument("--model", default="fashion", help="folder of the diffusion model")
    parser.add_argument("--classifier", type=Path, default=Path("runs/class-conditional/classifier.safetensors"))
    parser.add_argument("--data", type=Path, default=FOLDER, metavar="FOLDER", help="with the four IDX files")
    parser.add_argument("--count", type=int, default=1000, help="pictures (default 1000)")
    parser.add_argument("--steps", type=int, default=50, help="of DDIM (default 50)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default the model's)")
    return parser.parse_args()


def open_classifier(file: Path, data: Path) -> nn.Sequential:
    """The classifier in a file, which is written first if it is not there."""
    if not file.is_file():
        state = train_classifier(data).state_dict()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.half() if value.is_floating_point() else value for name, value in state.items()}, file)
    model = small_classifier(len(CLASSES))
    model.load_state_dict(load_file(file))
    return model.eval()


def main() -> None:
    arguments = read_arguments()
    try:
        classifier = open_classifier(arguments.classifier, arguments.data)
        pictures, labels = read_fashion(arguments.data, "t10k")
        model = PixelDiffusion.load(arguments.model) if arguments.count else None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    real = accuracy(classifier, as_input(pictures), labels)
    told = {"real": round(sum(real) / len(real), 4)}
    if model is not None:
        made = generate(model, arguments.count, steps=arguments.steps, guidance_scale=arguments.guidance)
        shares = accuracy(classifier, *made)
        share = sum(shares) / len(shares)
        deviation = math.sqrt(share * (1 - share) / arguments.count)
        told |= {"generated": round(share, 4), "standard_error": round(deviation, 4)}
        told |= {name: round(one, 3) for name, one in zip(CLASSES, shares, strict=True)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
