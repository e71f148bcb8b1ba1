"""The networks through `torch.compile`: for accelerators, where CUDA graphs replay each step."""

import torch
from torch import nn


def prepare(network: nn.Module) -> None:
    """Compile the UNet, or the VAE's decoder, at its first call."""
    part = getattr(network, "decoder", network)
    on_gpu = next(part.parameters()).device.type == "cuda"
    part.compile(mode="reduce-overhead" if on_gpu and torch.cuda.is_available() else "default")
