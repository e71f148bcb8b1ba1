"""Train the emoji model's autoencoder: pictures in, the same pictures out, through latents 8 times smaller.

The loss is what the eye minds: wrong colours (L1), wrong edges (L1 between differences of neighbouring
pixels), plus a very small pull of the latents towards the standard normal (KL). There is no discriminator
and no perceptual network: drawings with flat colours do without. Data are a function of the step, so a
resumed run sees what it would have seen.

    python scripts/train_vae.py    # writes runs/vae/vae.pt and sample pictures; run again to resume
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_data import FULL, PLAIN, Studio, Variety, draw_scene, fail
from emoji_model import EMOJI_VAE
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from training import learning_rate, load_checkpoint, save_checkpoint, to_picture

from minisd.config import VAEConfig
from minisd.vae import VAE, Gaussian

EDGE_WEIGHT, KL_WEIGHT = 0.5, 1e-4
TRAIN, TEST = 0, 1  # seeds of the two series of scenes


def pictures(studio: Studio, seed: int, start: int, count: int, variety: Variety) -> Tensor:
    """Scenes `start` ... `start + count` of a series as a batch (B, 3, 64, 64) in [-1, 1]."""
    scenes = [draw_scene(seed, index, variety) for index in range(start, start + count)]
    return torch.from_numpy(studio.batch(scenes, EMOJI_VAE.sample_size))


def loss(images: Tensor, decoded: Tensor, latents: Gaussian) -> Tensor:
    """Colours + edges + KL, each a mean over its elements."""
    colours = F.l1_loss(decoded, images)
    edges = sum(F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3))
    return colours + EDGE_WEIGHT * edges + KL_WEIGHT * latents.kl().mean() / latents.mean[0].numel()


def train(
    vae: VAE,
    folder: Path,
    *,
    steps: int,
    batch: int,
    peak: float,
    save_every: int,
    studio: Studio,
    variety: Variety,
) -> VAE:
    """Train up to step `steps`, going on from the folder's checkpoint if there is one."""
    trainable = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    first = load_checkpoint(folder / "train.pt", {"vae": vae, "optimizer": optimizer})
    progress = tqdm(range(first, steps), initial=first, total=steps, unit="step", mininterval=2)
    for step in progress:
        images = pictures(studio, TRAIN, step * batch, batch, variety)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak, warmup=100, total=steps)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images)
            noise = torch.Generator().manual_seed(step)
            decoded = vae.decode(latents.sample(noise))
        error = loss(images, decoded.float(), latents)
        optimizer.zero_grad()
        error.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        if step % 10 == 0:
            speed = batch * (progress.format_dict["rate"] or 0)
            progress.set_postfix_str(f"loss {error.item():.4f}, {speed:.0f} images/s", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_checkpoint(folder / "train.pt", {"vae": vae, "optimizer": optimizer}, step + 1)
            tqdm.write(f"step {step + 1}: {psnr(vae, studio, variety):.2f} dB")
            before_and_after(vae, studio, variety).save(folder / "sample.png")
    return vae.eval()


@torch.no_grad()
def psnr(vae: VAE, studio: Studio, variety: Variety, count: int = 256) -> float:
    """Mean peak signal-to-noise ratio of unseen scenes, in decibels."""
    images = pictures(studio, TEST, 0, count, variety)
    decoded = torch.cat([vae.decode(vae.encode(part).mode()) for part in images.split(64)]).clamp(-1, 1)
    mse = ((decoded - images) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * torch.log10(mse)).mean())


@torch.no_grad()
def before_and_after(vae: VAE, studio: Studio, variety: Variety, columns: int = 16) -> Image.Image:
    """Rows of unseen pictures, each above its reconstruction."""
    images = pictures(studio, TEST, 0, 3 * columns, variety)
    decoded = vae.decode(vae.encode(images).mode())
    rows = [row for pair in zip(images.split(columns), decoded.split(columns), strict=True) for row in pair]
    return to_picture(torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1))


@torch.no_grad()
def scaling_factor(vae: VAE, studio: Studio, variety: Variety, count: int = 2048) -> float:
    """One over the standard deviation of the latents (Rombach et al. 2022, appendix G)."""
    batches = [pictures(studio, TRAIN, start, 64, variety) for start in range(0, count, 64)]
    latents = torch.cat([vae.encode(images).sample() for images in batches])
    return 1 / float(latents.std())


def new_vae(start: Path | None) -> VAE:
    """Fresh weights; or those of a finished run, to train its decoder only.

    The latents then stay what they were, and a UNet that learnt them stays valid (as in Stability AI's sd-vae-ft-mse).
    """
    torch.manual_seed(0)
    if start is None:
        return VAE(EMOJI_VAE)
    vae = load_vae(start).train()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    return vae


def load_vae(path: Path) -> VAE:
    """The autoencoder that `main` wrote."""
    saved = torch.load(path, weights_only=True)
    vae = VAE(VAEConfig(**saved["config"]))
    vae.load_state_dict(saved["vae"])
    return vae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the emoji model's autoencoder; run again to resume.")
    parser.add_argument("--run", type=Path, default=Path("runs/vae"), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=8000, help="length of the whole run (default 8000)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decoder-of", type=Path, metavar="FILE", help="improve only the decoder of this vae.pt")
    parser.add_argument("--full", action="store_true", help="with sizes, places and pairs")
    parser.add_argument("--save-every", type=int, default=500, metavar="STEPS")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in its usual place")
    arguments = parser.parse_args()
    studio, variety = Studio(arguments.font), FULL if arguments.full else PLAIN
    if arguments.decoder_of and not arguments.decoder_of.is_file():
        sys.exit(fail(f"{arguments.decoder_of}: no such file"))
    arguments.run.mkdir(parents=True, exist_ok=True)
    vae = train(
        new_vae(arguments.decoder_of),
        arguments.run,
        steps=arguments.steps,
        batch=arguments.batch,
        peak=arguments.lr,
        save_every=arguments.save_every,
        studio=studio,
        variety=variety,
    )
    scale = vae.scaling_factor if arguments.decoder_of else scaling_factor(vae, studio, variety)
    if not math.isfinite(scale):
        sys.exit(fail("the latents are not finite; try a smaller --lr"))
    config = dataclasses.replace(EMOJI_VAE, scaling_factor=round(scale, 5))
    torch.save({"config": dataclasses.asdict(config), "vae": vae.state_dict()}, arguments.run / "vae.pt")
    print(arguments.run / "vae.pt")


if __name__ == "__main__":
    main()
