"""Train the emoji model's autoencoder: pictures in, the same pictures out, through latents 8 times smaller.

The loss is what the eye minds: wrong colours (L1, and squared: a few very wrong pixels are worse than many slightly
wrong ones), wrong edges (L1 between differences of neighbouring pixels), plus a very small pull of the latents towards
the standard normal (KL). There is no discriminator and no perceptual network: drawings with flat colours do without.
Half of the pictures are crowds of figures on grounds of any colour, which hold more edges than one thing on white.
Scenes are a function of the step, so a resumed run sees what it would have seen.

    python scripts/train_vae.py --size 64 --out runs/vae-64           # small pictures first: a quarter of the work
    python scripts/train_vae.py --from runs/vae-64/vae.pt            # then 128 x 128: writes runs/vae/vae.pt
    python scripts/train_vae.py --decoder-of runs/vae/vae.pt --out runs/vae-decoder
    torchrun --nproc-per-node 8 scripts/train_vae.py --batch 64       # the same on eight GPUs

Run it again to go on from the last checkpoint. `--batch` is the whole team's.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from emoji_data import FULL, PLAIN, Studio, Variety, draw_crowd, draw_scene, fail
from emoji_model import EMOJI_VAE
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from training import (
    Progress,
    Team,
    gather_team,
    learning_rate,
    load_checkpoint,
    mixed_precision,
    save_checkpoint,
    to_picture,
)

from minisd.config import VAEConfig
from minisd.pipeline import StableDiffusion
from minisd.vae import VAE

SQUARE_WEIGHT, EDGE_WEIGHT, KL_WEIGHT = 2.0, 0.5, 1e-4
WARMUP = 100  # steps
TRAIN, TEST = 0, 1  # seeds of the two series of scenes


class Drawings(Dataset[np.ndarray]):
    """An endless series of scenes as pictures (3, size, size) in [-1, 1]."""

    def __init__(self, studio: Studio, seed: int, variety: Variety, size: int, *, crowds: bool) -> None:
        """`crowds`: every second picture is one."""
        self.studio, self.seed, self.variety, self.size, self.crowds = studio, seed, variety, size, crowds

    def __getitem__(self, index: int) -> np.ndarray:
        crowd = self.crowds and index % 2
        scene = draw_crowd(self.seed, index) if crowd else draw_scene(self.seed, index, self.variety)
        return self.studio.batch([scene], self.size)[0]


def pictures(drawings: Dataset[np.ndarray], start: int, count: int) -> Tensor:
    """The pictures `start` ... `start + count` of a series as a batch (B, 3, H, W)."""
    return torch.from_numpy(np.stack([drawings[index] for index in range(start, start + count)]))


class Autoencoder(nn.Module):
    """Both ways at once, as DistributedDataParallel wants it."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, 8H, 8W), noise (B, 4, H, W) -> decoded images, and the latents' mean and log variance."""
        latents = self.vae.encode(images)
        decoded = self.vae.decode(latents.mean + (0.5 * latents.logvar).exp() * noise)
        return decoded, latents.mean, latents.logvar


def loss(images: Tensor, decoded: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """Colours + edges + KL, each a mean over its elements."""
    colours = F.l1_loss(decoded, images) + SQUARE_WEIGHT * F.mse_loss(decoded, images)
    edges = F.l1_loss(decoded.diff(dim=2), images.diff(dim=2)) + F.l1_loss(decoded.diff(dim=3), images.diff(dim=3))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return colours + EDGE_WEIGHT * edges + KL_WEIGHT * kl


def batches(drawings: Dataset[np.ndarray], first: int, last: int, batch: int, workers: int) -> DataLoader[np.ndarray]:
    """The batches of steps `first` ... `last`, drawn by `workers` processes (0: by this one)."""
    return DataLoader(drawings, batch, sampler=range(first * batch, last * batch), num_workers=workers)


def train(
    team: Team,
    folder: Path,
    drawings: Dataset[np.ndarray],
    vae: VAE,
    *,
    steps: int,
    batch: int,
    peak: float,
    save_every: int,
    workers: int,
    show: Callable[[VAE, int], None],
) -> VAE:
    """Train up to step `steps`, going on from the folder's checkpoint if there is one.

    `show(vae, step)` is called after each checkpoint, in the leading process.
    """
    vae = vae.to(team.device)
    trainable = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"vae": vae, "optimizer": optimizer}
    first = load_checkpoint(folder / "train.pt", parts)
    model = team.join(Autoencoder(vae))
    progress = Progress(folder, team, range(first, max(first, steps)), batch)
    for step, whole in zip(progress, batches(drawings, first, steps, batch, workers), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak, warmup=WARMUP, total=steps)
        images, noise = team.share(whole), team.share(noise_for(vae, whole, step))
        with mixed_precision(team.device):
            decoded, mean, logvar = model(images, noise)
        error = loss(images, decoded.float(), mean.float(), logvar.float())
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        progress.note(step, team.mean(error))
        if team.leads and ((step + 1) % save_every == 0 or step + 1 == steps):
            save_checkpoint(folder / "train.pt", parts, step + 1)
            show(vae, step + 1)
    return vae.eval()


def noise_for(vae: VAE, images: Tensor, step: int) -> Tensor:
    """The noise that samples a batch's latents: the same for every number of processes."""
    count, _, height, width = images.shape
    factor = vae.config.downsampling
    shape = (count, vae.config.latent_channels, height // factor, width // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


@torch.no_grad()
def psnr(vae: VAE, unseen: Dataset[np.ndarray], count: int = 64) -> float:
    """Mean peak signal-to-noise ratio of unseen scenes, in decibels."""
    images = pictures(unseen, 0, count).to(vae.quant_conv.weight.device)
    decoded = torch.cat([vae.decode(vae.encode(part).mode()) for part in images.split(16)]).clamp(-1, 1)
    mse = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(mse)).mean())


@torch.no_grad()
def before_and_after(vae: VAE, unseen: Dataset[np.ndarray], columns: int = 12) -> Image.Image:
    """Rows of unseen pictures, each above its reconstruction."""
    images = pictures(unseen, 0, 2 * columns).to(vae.quant_conv.weight.device)
    decoded = vae.decode(vae.encode(images).mode())
    rows = [row for pair in zip(images.split(columns), decoded.split(columns), strict=True) for row in pair]
    return to_picture(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1))


@torch.no_grad()
def scaling_factor(vae: VAE, drawings: Dataset[np.ndarray], count: int = 1024) -> float:
    """One over the standard deviation of the latents (Rombach et al. 2022, appendix G)."""
    device = vae.quant_conv.weight.device
    latents = [vae.encode(pictures(drawings, start, 16).to(device)).sample() for start in range(0, count, 16)]
    return 1 / float(torch.cat(latents).std())


def new_vae(start: Path | None, decoder_of: Path | None) -> VAE:
    """Fresh weights; those of a run before; or those of a finished run, to train its decoder only.

    With the encoder the latents stay what they were, and a UNet that learned them stays valid (as in Stability AI's
    sd-vae-ft-mse).
    """
    torch.manual_seed(0)
    if decoder_of is None:
        return load_vae(start).train() if start else VAE(EMOJI_VAE)
    vae = load_vae(decoder_of).train()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def load_vae(path: Path) -> VAE:
    """The autoencoder that `main` wrote, or that of a model's folder."""
    if path.is_dir():
        return StableDiffusion.load(path).vae.float().eval()
    saved = torch.load(path, weights_only=True)
    vae = VAE(VAEConfig(**saved["config"]))
    vae.load_state_dict(saved["vae"])
    return vae.eval()


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the emoji model's autoencoder; run again to resume.")
    parser.add_argument("--out", type=Path, default=Path("runs/vae"), metavar="FOLDER")
    parser.add_argument("--size", type=int, default=EMOJI_VAE.sample_size, help="pixels of the training pictures")
    parser.add_argument("--steps", type=int, default=8000, help="length of the whole run (default 8000)")
    parser.add_argument("--batch", type=int, default=8, help="pictures a step, of all processes together (default 8)")
    parser.add_argument("--lr", type=float, default=1e-3)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--from", dest="start", type=Path, metavar="FILE", help="begin with this vae.pt or model")
    start.add_argument("--decoder-of", type=Path, metavar="FILE", help="improve only this one's decoder")
    parser.add_argument("--plain", action="store_true", help="one thing in the middle: no sizes, places and pairs")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS", help="checkpoint and samples")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw (for a GPU: one for each core)")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in its usual place")
    arguments = parser.parse_args()
    for path in (arguments.start, arguments.decoder_of):
        if path and not path.exists():
            sys.exit(fail(f"{path}: no such file"))
    return arguments


def main() -> None:
    arguments = read_arguments()
    run = arguments.out
    run.mkdir(parents=True, exist_ok=True)
    studio, variety = Studio(arguments.font), PLAIN if arguments.plain else FULL
    drawings = Drawings(studio, TRAIN, variety, arguments.size, crowds=not arguments.plain)
    unseen = Drawings(studio, TEST, variety, arguments.size, crowds=False)

    def show(vae: VAE, step: int) -> None:
        tqdm.write(f"step {step}: {psnr(vae, unseen):.2f} dB")
        before_and_after(vae, unseen).save(run / "sample.png")

    with gather_team() as team:
        team.check_batch(arguments.batch)
        vae = train(
            team,
            run,
            drawings,
            new_vae(arguments.start, arguments.decoder_of),
            steps=arguments.steps,
            batch=arguments.batch,
            peak=arguments.lr,
            save_every=arguments.save_every,
            workers=arguments.workers,
            show=show,
        )
        if team.leads:
            finish(vae, unseen, keep_scale=arguments.decoder_of is not None, path=run / "vae.pt")
            print(run / "vae.pt")


def finish(vae: VAE, drawings: Dataset[np.ndarray], *, keep_scale: bool, path: Path) -> None:
    """Measure the scaling factor, unless the latents are those of before, and write the result."""
    scale = vae.scaling_factor if keep_scale else scaling_factor(vae, drawings)
    if not math.isfinite(scale):
        sys.exit(fail("the latents are not finite; try a smaller --lr"))
    config = dataclasses.replace(EMOJI_VAE, scaling_factor=round(scale, 5))
    torch.save({"config": dataclasses.asdict(config), "vae": vae.cpu().state_dict()}, path)


if __name__ == "__main__":
    main()
