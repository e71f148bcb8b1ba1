"""`AutoencoderTiny`: TAESD as diffusers' tree."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minisd import tiny_vae
from minisd.config import VAEConfig
from minisd.diffusers.loading import Source
from minisd.diffusers.models.network import Format, Network
from minisd.diffusers.outputs import output
from minisd.diffusers.refusing import accept

SETTINGS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "latent_channels": 4,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "force_upcast": False,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "block_out_channels": [64, 64, 64, 64],
}


def read(config: Mapping[str, Any], where: str, notes: list[str]) -> VAEConfig:
    """config.json -> TAESD's numbers: there is one TAESD. Raises ValueError for other settings."""
    for name, value in config.items():
        if not name.startswith("_") and SETTINGS.get(name, value) != value:
            raise ValueError(f"{where}: {name}={value!r} is not supported: TAESD has {SETTINGS[name]!r}")
    notes += [f"{where}: ignored {name}" for name in config if not name.startswith("_") and name not in SETTINGS]
    return tiny_vae.TAESD


class Half(nn.Module):
    """Encoder or decoder: its layers in a row."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers


class AutoencoderTiny(Network):
    """`minisd.tiny_vae.TinyVAE`."""

    component, kind = "vae", tiny_vae.TinyVAE
    format = Format(SETTINGS, read, lambda config: {"_class_name": "AutoencoderTiny"}, lambda config: iter(()))

    @classmethod
    def load_core(
        cls, source: Source, subfolder: str | None, variant: str | None, dtype: torch.dtype | None
    ) -> tiny_vae.TinyVAE:
        """Out of a folder or file on this machine. Raises NotCoveredError for a variant."""
        accept("AutoencoderTiny.from_pretrained", {"variant": variant}, {"variant": (None,)}, [])
        place = f"{source}/{subfolder}" if subfolder else str(source)
        core = tiny_vae.load_tiny_vae(place, dtype, torch.device("cpu"))
        if core is None:
            raise FileNotFoundError(f"{place}: there is no TAESD (a hub id must be downloaded first)")
        return core

    def grow(self, core: tiny_vae.TinyVAE) -> None:
        if core.tiny_encoder is not None:
            self.encoder = Half(core.tiny_encoder)
        self.decoder = Half(core.tiny_decoder)
        self.use_slicing = self.use_tiling = False

    def leaves_as_made(self) -> list[Any]:
        return [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images (B, 3, H, W) in [-1, 1] -> `.latents` (B, 4, H/8, W/8)."""
        return output(return_dict, latents=self.core.encode(x).mean)

    def decode(self, x: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        """Latents (B, 4, H/8, W/8) -> `.sample` (B, 3, H, W). `generator` is not used, there as here."""
        return output(return_dict, sample=self.core.decode(x))

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Images -> `.sample`: there and back, through latents of eight bits each, as diffusers does."""
        size, middle = 2 * SETTINGS["latent_magnitude"], SETTINGS["latent_shift"]
        scaled = (self.core.encode(sample).mean / size + middle).clamp(0, 1)
        stored = scaled.mul(255).round().byte() / 255
        return output(return_dict, sample=self.core.decode((stored - middle) * size))
