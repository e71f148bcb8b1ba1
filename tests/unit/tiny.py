"""A whole Stable Diffusion of a few hundred kB, made by minisd alone, and its tensors in the CompVis dialect."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from minisd import StableDiffusion
from minisd.config import SD15, TextEncoderConfig, UNetConfig, VAEConfig
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import CLIPTokenizer, vocabulary_of
from minisd.unet import UNet
from minisd.vae import VAE

MERGES = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
TOKENIZER = CLIPTokenizer(vocabulary_of(MERGES), MERGES, pad_token="<|endoftext|>", context_length=77)


def config_like(reference, **changes):
    return type(reference)(**{**vars(reference), **changes})


UNET: UNetConfig = config_like(SD15.unet, sample_size=8, widths=(32, 32, 32, 32), context_width=64)
VAE_CONFIG: VAEConfig = config_like(SD15.vae, sample_size=64, widths=(32, 32, 32, 32))
TEXT: TextEncoderConfig = config_like(
    SD15.text_encoder, vocabulary=len(TOKENIZER.vocabulary), width=64, heads=1, layers=2, hidden_width=64
)


def tiny_model(seed: int = 0, **unet_changes) -> StableDiffusion:
    """Random weights; norms and biases too, so that no two tensors are equal by accident."""
    torch.manual_seed(seed)
    modules = TextEncoder(TEXT), UNet(config_like(UNET, **unet_changes)), VAE(VAE_CONFIG)
    with torch.no_grad():
        for module in modules:
            for parameter in module.eval().parameters():
                parameter.normal_(0, 0.05)
    return StableDiffusion(*modules, TOKENIZER, scheduler=SD15.scheduler)


def compvis_tensors(sd: StableDiffusion, scratch: Path) -> dict[str, torch.Tensor]:
    sd.save(scratch / "tiny.safetensors", layout="compvis")
    return {name: tensor.clone() for name, tensor in load_file(scratch / "tiny.safetensors").items()}


def equal(one: StableDiffusion, other: StableDiffusion, parts=("unet", "vae", "text_encoder")) -> bool:
    """Are all weights equal, bit for bit?"""
    for part in parts:
        states = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        if states[0].keys() != states[1].keys():
            return False
        if not all(torch.equal(states[0][name], states[1][name]) for name in states[0]):
            return False
    return True
