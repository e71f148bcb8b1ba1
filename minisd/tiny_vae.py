"""TAESD: a tiny autoencoder for the latents of Stable Diffusion, distilled from its VAE (https://github.com/madebyollin/taesd).

2.4 million numbers instead of 84: pictures are a little softer and come in a fraction of the time. Its latents
are those of the loop: nothing is scaled, and nothing is drawn at random.

    # not run: needs the weights
    sd = StableDiffusion.load("sd15", vae="taesd_decoder.safetensors")
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.checkpoint.header import Files, open_files
from minisd.checkpoint.values import DTYPES, read_tensor
from minisd.config import SD15, VAEConfig
from minisd.files import CheckpointError
from minisd.noise import Generators
from minisd.vae import VAE, Gaussian

WEIGHTS = "diffusion_pytorch_model.safetensors"
ENCODER, DECODER = "taesd_encoder", "taesd_decoder"


# Its own numbers; the rest of the VAE's configuration means nothing here.
TAESD = replace(SD15.vae, widths=(64, 64, 64, 64), scaling_factor=1.0)


class TinyBlock(nn.Module):
    """Three convolutions and a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return F.relu(self.conv(x) + x)


def encoder_layers(config: VAEConfig) -> nn.Sequential:
    """(B, 3, 8H, 8W) in [0, 1] -> (B, 4, H, W)."""
    width = config.widths[0]
    layers: list[nn.Module] = [nn.Conv2d(config.image_channels, width, 3, padding=1), TinyBlock(width)]
    for _ in range(3):
        layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
        layers += [TinyBlock(width) for _ in range(3)]
    return nn.Sequential(*layers, nn.Conv2d(width, config.latent_channels, 3, padding=1))


def decoder_layers(config: VAEConfig) -> nn.Sequential:
    """(B, 4, H, W) -> (B, 3, 8H, 8W) in about [0, 1]."""
    width = config.widths[0]
    layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
    for _ in range(3):
        layers += [TinyBlock(width) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, TinyBlock(width), nn.Conv2d(width, config.image_channels, 3, padding=1))


class Certain(Gaussian):
    """What the encoder gives: latents (B, 4, H, W) without any variance."""

    def __init__(self, latents: Tensor) -> None:
        self.mean, self.logvar = latents, torch.full_like(latents, -torch.inf)

    def sample(self, generator: Generators = None) -> Tensor:
        """The latents; nothing is drawn."""
        return self.mean


class TinyVAE(VAE):
    """Images <-> latents, with the calls of the VAE that it replaces. Without an encoder it decodes only."""

    def __init__(self, *, encodes: bool = True) -> None:
        nn.Module.__init__(self)  # nothing of the VAE's own layers
        self.config = TAESD
        self.tiny_encoder = encoder_layers(TAESD) if encodes else None
        self.tiny_decoder = decoder_layers(TAESD)

    def encode(self, images: Tensor) -> Certain:
        """Images (B, 3, 8H, 8W) in [-1, 1] -> latents (B, 4, H, W). ValueError where only a decoder was loaded."""
        if self.tiny_encoder is None:
            raise ValueError(f"this TAESD can only decode: {ENCODER}.safetensors was not beside its decoder")
        return Certain(self.tiny_encoder(images.add(1).div(2)))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, H, W) -> images (B, 3, 8H, 8W), about in [-1, 1]. Latents are first bent into [-3, 3]."""
        return self.tiny_decoder(torch.tanh(latents / 3) * 3).mul(2).sub(1)


# ---- files -------------------------------------------------------------------------------------------------------


def tiny_files(source: str | os.PathLike[str]) -> list[Files]:
    """The file at `source`, or in that folder, and the other half beside it. [] where there is none."""
    path = Path(os.path.expanduser(source))
    path = path / WEIGHTS if path.is_dir() else path
    if path.suffix != ".safetensors" or not path.is_file():
        return []
    halves = {path.name.replace(one, other) for one in (ENCODER, DECODER) for other in (ENCODER, DECODER)}
    paths = [path, *(path.with_name(name) for name in sorted(halves - {path.name}))]
    return [open_files([one], one) for one in paths if one.is_file()]


def tensor_names(files: Files) -> dict[str, str]:
    """minisd's name -> the file's: diffusers', or the original ones, plain numbers; {} if it is no TAESD."""
    names: dict[str, str] = {}
    for half, title in (("encoder", ENCODER), ("decoder", DECODER)):
        numbers = "" if title in files.path.name else f"{title}."  # a file of its own, or both in one
        # In the original the decoder's layer 0 bends the latents; diffusers counts from the convolution behind it.
        for prefix, first in ((f"{half}.layers.", 0), (numbers, int(half == "decoder"))):
            for name in files.tensors:
                number, _, rest = name.removeprefix(prefix).partition(".")
                if name.startswith(prefix) and number.isdigit():
                    names[f"tiny_{half}.{int(number) - first}.{rest}"] = name
    return names


def load_tiny_vae(source: str | os.PathLike[str], dtype: torch.dtype | None, device: torch.device) -> TinyVAE | None:
    """The TAESD at `source`, a file of either half or both, or a folder as diffusers saves it; None for anything else.

    Raises CheckpointError for one of another shape, such as SD 3's or a video model's.
    """
    found: dict[str, tuple[Files, str]] = {}
    for files in tiny_files(source):
        found |= {name: (files, stored) for name, stored in tensor_names(files).items() if name not in found}
    if not found:
        return None
    model = TinyVAE(encodes=any(name.startswith("tiny_encoder.") for name in found))
    check_shapes(source, model.state_dict(), found)
    kinds = {files.tensors[stored].dtype for files, stored in found.values()}
    dtype = dtype or DTYPES[min(kinds)]
    model.load_state_dict({name: read_tensor(*where).to(device, dtype) for name, where in found.items()}, assign=True)
    return model.eval()


def check_shapes(
    source: str | os.PathLike[str], wanted: Mapping[str, Tensor], found: Mapping[str, tuple[Files, str]]
) -> None:
    """Raise CheckpointError unless the tensors are just those of TAESD."""
    for name in wanted.keys() - found.keys():
        raise CheckpointError(f"{source}: is a TAESD without {name}")
    for name, (files, stored) in found.items():
        shape, info = tuple(wanted[name].shape) if name in wanted else None, files.tensors[stored]
        if info.shape != shape or info.dtype not in DTYPES:
            raise CheckpointError(
                f"{source}: is not SD 1.x's TAESD: {stored} is {info.dtype} {list(info.shape)}"
                + (f", not {list(shape)}" if shape else ", which that does not have")
            )
