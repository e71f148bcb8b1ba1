"""Train the emoji model's UNet and text encoder: predict the noise in a latent, given its caption.

The pictures are painted and encoded once, into a bank of latents; captions are drawn anew for every step.
The batch of a step is a function of the step, so a run that was stopped goes on as if nothing had happened.

    python scripts/train_text_to_image.py --vae runs/vae/vae.pt --tokenizer runs/tokenizer --steps 12000

The end writes a folder that `minisd generate --model runs/text-to-image/model` takes; `--steps 0` writes the state of
the last checkpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from emoji_data import FULL, PLAIN, Scene, Studio, Variety, caption, contact_sheet, draw_scene, fail
from emoji_model import EMOJI_TEXT_ENCODER, EMOJI_UNET
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from train_vae import load_vae
from training import learning_rate, load_checkpoint, save_checkpoint

from minisd.config import SD15
from minisd.pipeline import StableDiffusion
from minisd.schedulers import DDIMScheduler
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import CLIPTokenizer
from minisd.unet import UNet
from minisd.vae import VAE

NO_CAPTION = 0.1  # share of empty captions, for classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598)
SNR_LIMIT = 5.0  # Hang et al. 2023, arXiv:2303.09556: low-noise steps would otherwise dominate the gradient
EMA_DECAY = 0.999
SEED = 0
GENERATION = {"steps": 30, "guidance_scale": 4.0}
PROMPTS = (
    "red heart",
    "sun",
    "tomato",
    "blue circle",
    "cat",
    "pizza",
    "rocket",
    "a red heart on a blue background",
    "a dog",
    "a fox",
    "a panda on a pink background",
    "mushroom",
    "umbrella",
    "house",
    "a car on a yellow background",
    "green square",
    "star",
    "sunflower",
    "a ghost on a black background",
    "robot",
    "fish",
    "rainbow",
    "smiling face",
    "a tree on an orange background",
)


class Denoiser(nn.Module):
    """The two networks that train together, as one."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(EMOJI_TEXT_ENCODER)
        self.unet = UNet(EMOJI_UNET)
        # Positions whisper at first, so that the words are heard above them.
        nn.init.normal_(self.text_encoder.position_embedding.weight, std=0.1)

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Noise in `noisy` (B, 4, h, w) at `timesteps` (B,) under token ids (B, 77)."""
        return self.unet(noisy, timesteps, self.text_encoder(ids))


# ---- data ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bank:
    """Scenes and the moments of their latents, scaled to unit variance."""

    scenes: Sequence[Scene]
    mean: Tensor  # (N, 4, 8, 8)
    std: Tensor


def open_bank(path: Path, vae: VAE, font: Path | None, *, count: int, variety: Variety) -> Bank:
    """The bank of this run: read from its file if that fits, else filled and written."""
    scenes = [draw_scene(SEED, index, variety) for index in range(count)]
    key = f"{variety} {hash_of(scenes)} {vae.scaling_factor}"
    if path.is_file():
        stored = torch.load(path, weights_only=True)
        if stored["key"] == key:
            return Bank(scenes, stored["mean"], stored["std"])
    bank = fill_bank(scenes, vae, Studio(font))
    torch.save({"key": key, "mean": bank.mean, "std": bank.std}, path)
    return bank


def hash_of(scenes: Sequence[Scene]) -> str:
    """Changes when the scenes change."""
    return hashlib.sha256(repr(scenes).encode()).hexdigest()


@torch.no_grad()
def fill_bank(scenes: Sequence[Scene], vae: VAE, studio: Studio) -> Bank:
    """Paint and encode scenes."""
    means, stds = [], []
    for start in tqdm(range(0, len(scenes), 64), desc="encoding", unit="batch"):
        images = torch.from_numpy(studio.batch(scenes[start : start + 64], vae.config.sample_size))
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images)
        means.append(latents.mean.float() * vae.scaling_factor)
        stds.append((0.5 * latents.logvar.float()).exp() * vae.scaling_factor)
    return Bank(scenes, torch.cat(means).contiguous(), torch.cat(stds).contiguous())


def draw_batch(bank: Bank, tokenizer: CLIPTokenizer, size: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise, timesteps and token ids of a step."""
    rng, generator = random.Random(f"{SEED}/{step}"), torch.Generator().manual_seed(step)
    chosen = [rng.randrange(len(bank.scenes)) for _ in range(size)]
    captions = ["" if rng.random() < NO_CAPTION else caption(bank.scenes[i], rng) for i in chosen]
    mean, std = bank.mean[chosen], bank.std[chosen]
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    # One timestep from each of `size` equal shares of the range: still uniform, but no batch is all easy or all hard.
    shares = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    return latents, noise, (shares * 1000).long(), tokenizer(captions)


# ---- training --------------------------------------------------------------------------------------------


def weights(scheduler: DDIMScheduler, timesteps: Tensor) -> Tensor:
    """min(SNR, limit) / SNR for each timestep: the weight of its squared error in the noise."""
    alpha_bar = scheduler.alphas_cumprod[timesteps]
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=SNR_LIMIT) / snr


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int) -> None:
    """Exponential moving average of the weights; young averages forget faster."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def train(
    folder: Path,
    bank: Bank,
    vae: VAE,
    tokenizer: CLIPTokenizer,
    *,
    steps: int,
    batch: int,
    peak: float,
    save_every: int,
    sample_every: int,
) -> Denoiser:
    """Train up to step `steps`, going on from the folder's checkpoint if there is one; return the average."""
    torch.manual_seed(SEED)
    model, average = Denoiser(), Denoiser().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    parts = {"model": model, "average": average, "optimizer": optimizer}
    first = load_checkpoint(folder / "train.pt", parts)
    scheduler = DDIMScheduler.from_config(SD15.scheduler)
    progress = tqdm(range(first, max(first, steps)), initial=first, total=steps, unit="step", mininterval=2)
    recent = 0.0
    for step in progress:
        latents, noise, timesteps, ids = draw_batch(bank, tokenizer, batch, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=peak, warmup=300, total=steps)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            predicted = model(noisy, timesteps, ids)
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        loss = (weights(scheduler, timesteps) * error).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        follow(average, model, step)
        recent = loss.item() if step == first else 0.98 * recent + 0.02 * loss.item()
        if step % 10 == 0:
            speed = batch * (progress.format_dict["rate"] or 0)
            progress.set_postfix_str(f"loss {recent:.4f}, {speed:.0f} images/s", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_checkpoint(folder / "train.pt", parts, step + 1)
        if (step + 1) % sample_every == 0 or step + 1 == steps:
            tqdm.write(f"step {step + 1}: loss {recent:.4f}")
            grid(assemble(average, vae, tokenizer)).save(folder / f"sample-{step + 1:06d}.png")
    return average


# ---- looking at it ---------------------------------------------------------------------------------------


def assemble(denoiser: Denoiser, vae: VAE, tokenizer: CLIPTokenizer) -> StableDiffusion:
    """The whole model, with the settings that suit it."""
    return StableDiffusion(
        denoiser.text_encoder, denoiser.unet, vae, tokenizer, scheduler=SD15.scheduler, generation=GENERATION
    )


def grid(sd: StableDiffusion, columns: int = 8) -> Image.Image:
    """A picture for each of PROMPTS, always from the same noise."""
    pictures = sd.text_to_image(list(PROMPTS), seed=SEED, **GENERATION)
    return contact_sheet(pictures, PROMPTS, columns)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train UNet and text encoder of the emoji model; run again to resume.")
    parser.add_argument("--run", type=Path, default=Path("runs/text-to-image"), metavar="FOLDER")
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae.pt"), metavar="FILE")
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/tokenizer"), metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=12_000, help="length of the whole run (default 12000)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bank", type=int, default=10_240, metavar="SCENES", help="pictures to encode beforehand")
    parser.add_argument("--full", action="store_true", help="with sizes, places and pairs")
    parser.add_argument("--save-every", type=int, default=300, metavar="STEPS")
    parser.add_argument("--sample-every", type=int, default=600, metavar="STEPS")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, if it is not in its usual place")
    arguments = parser.parse_args()
    for path in (arguments.vae, arguments.tokenizer / "vocab.json"):
        if not path.is_file():
            sys.exit(fail(f"{path}: no such file; run train_vae.py and train_tokenizer.py first"))
    arguments.run.mkdir(parents=True, exist_ok=True)
    vae, tokenizer = load_vae(arguments.vae), CLIPTokenizer.from_folder(arguments.tokenizer)
    variety = FULL if arguments.full else PLAIN
    bank = open_bank(arguments.run / "bank.pt", vae, arguments.font, count=arguments.bank, variety=variety)
    model = train(
        arguments.run,
        bank,
        vae,
        tokenizer,
        steps=arguments.steps,
        batch=arguments.batch,
        peak=arguments.lr,
        save_every=arguments.save_every,
        sample_every=arguments.sample_every,
    )
    assemble(model, vae, tokenizer).save(arguments.run / "model", dtype=torch.float16)
    print(arguments.run / "model")


if __name__ == "__main__":
    main()
