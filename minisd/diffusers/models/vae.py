"""`AutoencoderKL`: minisd's VAE as diffusers' tree."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minisd import layers, vae
from minisd.diffusers.models.attention_processor import HasAttention
from minisd.diffusers.models.blocks import (
    ACTIVATIONS,
    DownEncoderBlock2D,
    Downsample2D,
    ResnetBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
    Upsample2D,
)
from minisd.diffusers.models.network import Format, Network
from minisd.diffusers.models.unet import in_turn, leaves
from minisd.diffusers.outputs import output
from minisd.tiling import in_tiles


class DiagonalGaussianDistribution(vae.Gaussian):
    """`latent_dist`: `mean`, `logvar`, `std`, `var`, `sample(generator)`, `mode()`."""

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)


class Encoder(nn.Module):
    """`minisd.vae.Encoder`."""

    def __init__(self, core: vae.Encoder, per_level: int) -> None:
        super().__init__()
        self.conv_in = core.conv_in
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D([ResnetBlock2D(one) for one in resnets], [Downsample2D(one) for one in resized])
            for resnets, resized in levels(core.down, per_level)
        )
        self.mid_block = UNetMidBlock2D.of(core.middle)
        self.conv_norm_out, self.conv_act = core.norm_out, ACTIVATIONS[core.activation]()
        self.conv_out = core.conv_out

    def forward(self, sample: Tensor) -> Tensor:
        """(B, 3, 8H, 8W) -> (B, 8, H, W)."""
        x = self.conv_in(sample)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """`minisd.vae.Decoder`."""

    def __init__(self, core: vae.Decoder, per_level: int) -> None:
        super().__init__()
        self.conv_in = core.conv_in
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D([ResnetBlock2D(one) for one in resnets], [Upsample2D(one) for one in resized])
            for resnets, resized in levels(core.up, per_level)
        )
        self.mid_block = UNetMidBlock2D.of(core.middle)
        self.conv_norm_out, self.conv_act = core.norm_out, ACTIVATIONS[core.activation]()
        self.conv_out = core.conv_out

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """(B, 4, H, W) -> (B, 3, 8H, 8W)."""
        x = self.mid_block(self.conv_in(sample), latent_embeds)
        for block in self.up_blocks:
            x = block(x, latent_embeds)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


def levels(blocks: Iterable[nn.Module], per_level: int) -> list[tuple[list[Any], list[Any]]]:
    """minisd's flat list -> each level's resnets, and what changes the resolution behind them."""
    found: list[tuple[list[Any], list[Any]]] = []
    for block in blocks:
        if not isinstance(block, layers.ResnetBlock):
            found[-1][1].append(block)
            continue
        if not found or len(found[-1][0]) == per_level:
            found.append(([], []))
        found[-1][0].append(block)
    return found


class AutoencoderKL(Network, HasAttention):
    """`minisd.vae.VAE`."""

    component, kind = "vae", vae.VAE
    format = Format.of(component)

    def grow(self, core: vae.VAE) -> None:
        self.encoder = Encoder(core.encoder, core.config.resnets_per_level)
        self.decoder = Decoder(core.decoder, core.config.resnets_per_level + 1)
        self.quant_conv, self.post_quant_conv = core.quant_conv, core.post_quant_conv
        self.use_slicing = self.use_tiling = False

    def leaves_as_made(self) -> list[Any]:
        down, up = self.encoder, self.decoder
        parts: list[nn.Module] = [down.conv_in]
        for block in (*down.down_blocks, down.mid_block):
            parts += in_turn(block)
        parts += [down.conv_norm_out, down.conv_out, up.conv_in]
        for block in (up.mid_block, *up.up_blocks):
            parts += in_turn(block)
        return leaves([*parts, up.conv_norm_out, up.conv_out, self.quant_conv, self.post_quant_conv])

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images (B, 3, H, W) in [-1, 1] -> `.latent_dist` over latents (B, 4, H/8, W/8), unscaled."""
        moments = self.sliced(lambda images: self.quant_conv(self.encoder(images)), x, self.tiles())
        return output(return_dict, latent_dist=DiagonalGaussianDistribution(moments))

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Unscaled latents (B, 4, H/8, W/8) -> `.sample` (B, 3, H, W). `generator` is not used, there as here."""
        sample = self.sliced(lambda one: self.decoder(self.post_quant_conv(one)), z, self.tiles()[::-1])
        return output(return_dict, sample=sample)

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True, generator: Any = None
    ) -> Any:
        """Encode, take the mean (or a sample), decode: `.sample`, shaped as the images."""
        dist = self.encode(sample).latent_dist
        return self.decode(dist.sample(generator) if sample_posterior else dist.mode(), return_dict)

    def sliced(self, network: Callable[[Tensor], Tensor], x: Tensor, sides: tuple[int, int]) -> Tensor:
        """One picture at a time after `enable_slicing`, else all at once; after `enable_tiling` in tiles of `sides`."""
        run = partial(in_tiles, network, side=sides[0], out_side=sides[1]) if self.use_tiling else network
        return torch.cat([run(one) for one in x.split(1)]) if self.use_slicing and len(x) > 1 else run(x)

    def tiles(self) -> tuple[int, int]:
        """The side of a tile in pixels, and in latents."""
        return self.config.sample_size, self.config.sample_size // 2 ** (len(self.config.block_out_channels) - 1)

    def enable_slicing(self) -> None:
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        self.use_tiling = False
