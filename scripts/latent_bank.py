"""The data of text-to-image training: many scenes, drawn and encoded once, with captions drawn anew for every step.

The batch of a step is a function of the step alone, so a run that was stopped goes on as if nothing had happened, and
every process of a team knows the whole batch and takes its share.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_data import Scene, Studio, as_array, caption
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from training import Team, mixed_precision

from minisd.batch.shards import read_samples
from minisd.tokenizer import CLIPTokenizer
from minisd.vae import VAE

SEED = 0
NO_CAPTION = 0.1  # share of empty captions, for classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598)


@dataclass(frozen=True)
class Sample:
    """A picture out of shards that `minisd sample` made, with its prompt."""

    text: str
    png: bytes


class Shards:
    """Draws samples, as `Studio` draws scenes."""

    def batch(self, samples: Sequence[Sample], size: int) -> np.ndarray:
        """Many as one array (B, 3, size, size), float32 in [-1, 1]."""
        opened = (Image.open(io.BytesIO(sample.png)) for sample in samples)
        return as_array([picture.convert("RGB").resize((size, size)) for picture in opened])


def read_shards(folder: Path) -> list[Sample]:
    """All samples in a folder that `minisd sample` made."""
    return [Sample(parts["txt"].decode(), parts["png"]) for _, parts in read_samples(folder)]


@dataclass(frozen=True)
class Bank:
    """Scenes and the moments of their latents, scaled to unit variance."""

    scenes: Sequence[Scene | Sample]
    mean: Tensor  # (N, 4, H/8, W/8)
    std: Tensor


@dataclass(frozen=True)
class Batch:
    """What the denoiser learns from in one step."""

    latents: Tensor  # (B, 4, H/8, W/8)
    noise: Tensor  # the same
    timesteps: Tensor  # (B,)
    ids: Tensor  # (B, 77)

    def share(self, team: Team) -> Batch:
        """The part of one process."""
        return Batch(team.share(self.latents), team.share(self.noise), team.share(self.timesteps), team.share(self.ids))


def open_bank(
    path: Path, vae: VAE, team: Team, scenes: Sequence[Scene | Sample], drawn: Callable[[], Studio | Shards]
) -> Bank:
    """The bank in `path`; if there is none, or one of other scenes, the team fills it first. `drawn()` draws them."""
    key = f"{hashlib.sha256(repr(scenes).encode()).hexdigest()} {_fingerprint(vae)}"
    if _key(path) != key:
        moments = encode(scenes[team.rank :: team.size], vae.to(team.device), drawn())
        mean, std = map(team.whole, moments)
        if team.leads:
            torch.save({"key": key, "mean": mean, "std": std}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
    team.wait()
    stored = torch.load(path, weights_only=True)
    return Bank(scenes, stored["mean"], stored["std"])


def _key(path: Path) -> str | None:
    return torch.load(path, weights_only=True, mmap=True)["key"] if path.is_file() else None


def _fingerprint(vae: VAE) -> str:
    """Changes when the encoder changes (a decoder may be improved without harm)."""
    digest = hashlib.sha256(str(vae.scaling_factor).encode())
    for weight in [*vae.encoder.parameters(), *vae.quant_conv.parameters()]:
        digest.update(weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode(scenes: Sequence[Any], vae: VAE, studio: Studio | Shards) -> tuple[Tensor, Tensor]:
    """Draw scenes and encode them: mean and standard deviation of their latents, each (N, 4, H/8, W/8)."""
    device = vae.quant_conv.weight.device
    means, stds = [], []
    for start in tqdm(range(0, len(scenes), 32), desc="encoding", unit="batch", mininterval=2):
        images = torch.from_numpy(studio.batch(scenes[start : start + 32], vae.config.sample_size))
        with mixed_precision(device):
            latents = vae.encode(images.to(device))
        means.append(latents.mean.float().cpu() * vae.scaling_factor)
        stds.append((0.5 * latents.logvar.float()).exp().cpu() * vae.scaling_factor)
    return torch.cat(means).contiguous(), torch.cat(stds).contiguous()


def said(scene: Scene | Sample, rng: random.Random) -> str:
    """The prompt of a sample, or one of the ways to say a scene."""
    return scene.text if isinstance(scene, Sample) else caption(scene, rng)


def draw_batch(bank: Bank, tokenizer: CLIPTokenizer, size: int, step: int) -> Batch:
    """The whole batch of a step."""
    rng, generator = random.Random(f"{SEED}/{step}"), torch.Generator().manual_seed(step)
    chosen = [rng.randrange(len(bank.scenes)) for _ in range(size)]
    captions = ["" if rng.random() < NO_CAPTION else said(bank.scenes[i], rng) for i in chosen]
    mean, std = bank.mean[chosen], bank.std[chosen]
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    # One timestep from each of `size` equal shares of the range: still uniform, but no batch is all easy or all hard.
    shares = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    return Batch(latents, noise, (shares * 1000).long(), tokenizer(captions))
