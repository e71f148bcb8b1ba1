"""Stable Diffusion with two levels and one block on each: small enough to be compared fifty times in a minute."""

from typing import Any

import torch

from minisd.config import SD15
from minisd.lab.parity.cases import Case
from minisd.lab.parity.sides import MinisdSide
from minisd.pipeline import StableDiffusion
from minisd.text_encoder import TextEncoder
from minisd.unet import UNet
from minisd.vae import VAE
from tests.unit.tiny import TEXT, TOKENIZER, VAE_CONFIG, config_like
from tests.unit.tiny import UNET as TINY_UNET

CASE = Case(prompts=("a red cat", "red"), negatives=("cat", ""), steps=1, height=16, width=24)
UNET = config_like(TINY_UNET, widths=(32, 64), attention=(True, False), resnets_per_level=1, sample_size=8)
VAE_SMALL = config_like(VAE_CONFIG, widths=(32, 32), resnets_per_level=1, sample_size=16)


def small_model(seed: int = 0, **scheduler: Any) -> StableDiffusion:
    """Random weights, norms and biases too."""
    torch.manual_seed(seed)
    modules = TextEncoder(TEXT), UNet(UNET), VAE(VAE_SMALL)
    with torch.no_grad():
        for module in modules:
            for parameter in module.eval().parameters():
                parameter.normal_(0, 0.05)
    return StableDiffusion(*modules, TOKENIZER, scheduler={**SD15.scheduler, **scheduler})


def side(sd: StableDiffusion, name: str = "minisd:small") -> MinisdSide:
    return MinisdSide(name, sd, sd.config)
