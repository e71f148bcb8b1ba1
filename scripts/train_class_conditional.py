"""Train the class-conditional UNet of `weights/fashion`: predict the noise in a picture of Fashion-MNIST, given its
class (Ho et al. 2020, algorithm 1).

    python scripts/train_class_conditional.py --steps 3700
    torchrun --nproc-per-node 8 scripts/train_class_conditional.py ...      # the same run on eight GPUs, or CPU sockets

A tenth of the pictures learn without their class (the label `ANY`), for classifier-free guidance. Run it again to go on
from the last checkpoint. The end writes a folder that `minisd classes --model` takes; `--steps 0` writes the state of
the last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fashion_data import ANY, CLASSES, FOLDER, as_input, read_fashion, read_shards
from PIL import Image
from torch import Tensor
from training import (
    Progress,
    Team,
    follow,
    gather_team,
    learning_rate,
    load_checkpoint,
    mixed_precision,
    save_checkpoint,
)

from minisd.pixel.config import PixelUNetConfig
from minisd.pixel.pipeline import PixelDiffusion
from minisd.pixel.sheet import sheet
from minisd.pixel.unet import PixelUNet
from minisd.schedulers import DDPMScheduler

UNTOLD = 0.1  # the share of pictures that learn without their class
WARMUP = 200  # steps
SEED = 0
GENERATION = {"steps": 50, "guidance_scale": 1.5, "unconditional": ANY, "classes": CLASSES}
SCHEDULE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
CONFIG = PixelUNetConfig(
    sample_size=(32, 32),
    in_channels=1,
    out_channels=1,
    center_input=False,
    widths=(32, 64, 96),
    down_attention=(False, False, True),
    up_attention=(True, False, False),
    resnets_per_level=1,
    middle=True,
    middle_attention=True,
    middle_scale=1,
    middle_attention_groups=8,
    head_width=32,
    time_width=128,
    cosines_first=True,
    frequency_shift=0,
    scale_shift=False,
    class_embedding="table",
    classes=len(CLASSES) + 1,
    activation="silu",
    dropout=0.0,
    downsample="conv",
    upsample="conv",
    downsample_padding=1,
    norm_groups=8,
    norm_eps=1e-5,
)


@dataclass(frozen=True)
class Batch:
    """Clean pictures (B, 1, 32, 32) in [-1, 1], their classes (B,), and what is drawn for them."""

    pictures: Tensor
    labels: Tensor
    noise: Tensor
    timesteps: Tensor

    def share(self, team: Team) -> Batch:
        return Batch(*(team.share(value) for value in vars(self).values()))


def draw_batch(pictures: Tensor, labels: Tensor, size: int, step: int) -> Batch:
    """The batch of a step: the same in every process, and whenever a run goes on."""
    generator = torch.Generator().manual_seed(SEED + 1_000_003 * step)
    chosen = torch.randint(len(pictures), (size,), generator=generator)
    untold = torch.rand(size, generator=generator) < UNTOLD
    clean = as_input(pictures[chosen])
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(1000, (size,), generator=generator)
    return Batch(clean, labels[chosen].masked_fill(untold, ANY), noise, timesteps)


def learn(model: torch.nn.Module, batch: Batch, scheduler: DDPMScheduler) -> Tensor:
    """The loss of a batch, DDPM eq. 14: how badly the noise was guessed. Sets the gradients."""
    noisy = scheduler.add_noise(batch.pictures, batch.noise, batch.timesteps)
    with mixed_precision(noisy.device):
        predicted = model(noisy, batch.timesteps, batch.labels)
    loss = F.mse_loss(predicted.float(), batch.noise)
    loss.backward()
    return loss


def train(
    team: Team,
    folder: Path,
    data: tuple[Tensor, Tensor],
    arguments: argparse.Namespace,
    show: Callable[[PixelUNet, int], None],
) -> PixelUNet:
    """Train up to `--steps`, going on from the folder's checkpoint if there is one; return the average.

    `show(average, step)` is called after each checkpoint, in the leading process.
    """
    unet = new_unet(arguments.start).to(team.device)
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"model": unet, "average": average, "optimizer": optimizer}
    first = load_checkpoint(folder / "train.pt", parts)
    model, scheduler = team.join(unet), DDPMScheduler(**SCHEDULE)
    progress = Progress(folder, team, range(first, max(first, arguments.steps)), arguments.batch)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=arguments.lr, warmup=WARMUP, total=arguments.steps)
        optimizer.zero_grad()
        loss = learn(model, draw_batch(*data, arguments.batch, step).share(team), scheduler)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        follow(average, unet, step)
        progress.note(step, team.mean(loss))
        if team.leads and ((step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps):
            save_checkpoint(folder / "train.pt", parts, step + 1)
            show(average, step + 1)
    return average


def new_unet(start: Path | None) -> PixelUNet:
    """Fresh weights, or those of a model that learned before."""
    torch.manual_seed(SEED)
    unet = PixelUNet(CONFIG)
    if start is not None:
        unet.load_state_dict(PixelDiffusion.load(start).unet.state_dict())
    return unet


def assemble(unet: PixelUNet) -> PixelDiffusion:
    """The whole model, with the settings that suit it."""
    unet = copy.deepcopy(unet).cpu().eval()
    return PixelDiffusion(unet, scheduler={"_class_name": "DDPMScheduler", **SCHEDULE}, generation=GENERATION)


def contact_sheet(model: PixelDiffusion) -> Image.Image:
    """Eight pictures of each class, in a row, always from the same noise."""
    labels = [label for label in range(len(CLASSES)) for _ in range(8)]
    return sheet(model.sample(labels, seed=SEED), list(CLASSES))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the UNet of weights/fashion; run again to resume.")
    parser.add_argument("--out", type=Path, default=Path("runs/class-conditional"), metavar="FOLDER")
    parser.add_argument("--data", type=Path, default=FOLDER, metavar="FOLDER", help="with the four IDX files")
    parser.add_argument("--shards", type=Path, metavar="FOLDER", help="learn from what `minisd sample` made instead")
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="FOLDER", help="begin with the weights of this model"
    )
    parser.add_argument("--steps", type=int, default=3700, help="length of the whole run (default 3700)")
    parser.add_argument("--batch", type=int, default=64, help="pictures a step, of all processes together (default 64)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=300, metavar="STEPS", help="checkpoint and samples")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    try:
        data = read_shards(arguments.shards) if arguments.shards else read_fashion(arguments.data, "train")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    arguments.out.mkdir(parents=True, exist_ok=True)

    def show(average: PixelUNet, step: int) -> None:
        contact_sheet(assemble(average)).save(arguments.out / f"step-{step:06}.png")

    with gather_team() as team:
        team.check_batch(arguments.batch)
        average = train(team, arguments.out, data, arguments, show)
        if team.leads:
            assemble(average).save(arguments.out / "model", dtype=torch.float16)
            print(arguments.out / "model")


if __name__ == "__main__":
    main()
