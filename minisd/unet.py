"""Noisy latents, timestep, text -> noise prediction: the UNet with cross-attention, as a flat list of blocks.

In: latents (B, 4, H/8, W/8), timesteps, context (B, 77, 768) from `text_encoder.py`. Out: the predicted noise, shaped
as the latents. Next in the walk: `schedulers/`, which step from x_t to x_{t-1} with it; then `vae.py`.
"""

import math
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minisd.config import UNetConfig
from minisd.layers import ACTIVATIONS, Attention, Downsample, ResnetBlock, Upsample


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal timestep embedding, (B,) -> (B, width) float32 (Vaswani et al. 2017, section 3.5).

    Cosines first, then sines: the order that CompVis trained with.
    """
    half = width // 2
    # Geometric frequencies from 1 down to 1/10000. In float32 whatever the model's dtype: bfloat16 cannot tell
    # neighbouring timesteps apart.
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps[:, None].float() * frequencies[None, :]  # (B, width/2)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)  # (B, width)


class TimeEmbedding(nn.Module):
    """The two-layer network between the sinusoidal embedding and the ResNet blocks."""

    def __init__(self, sinusoidal_width: int, width: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.linear1 = nn.Linear(sinusoidal_width, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, sinusoidal: Tensor) -> Tensor:
        """(B, sinusoidal_width) -> (B, width)."""
        return self.linear2(self.activation(self.linear1(sinusoidal)))


class GatedFeedForward(nn.Module):
    """GEGLU feed-forward network (Shazeer 2020, arXiv:2002.05202): value * gelu(gate), with the exact (erf) GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        value, gate = self.expand(x).chunk(2, dim=-1)  # (B, N, 4C) each
        return self.contract(value * F.gelu(gate))  # (B, N, C)


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention to the text, GEGLU feed-forward; each pre-norm with a residual connection."""

    def __init__(self, level: int, config: UNetConfig) -> None:
        super().__init__()
        self.add_parts(level, config)

    def add_parts(self, level: int, config: UNetConfig) -> None:
        width, heads, eps = config.widths[level], config.heads_at(level), config.layer_norm_eps
        self.self_attn_norm = nn.LayerNorm(width, eps=eps)
        self.self_attn = Attention(width, width, heads=heads, qkv_bias=False)
        self.cross_attn_norm = nn.LayerNorm(width, eps=eps)
        self.cross_attn = Attention(width, config.context_width, heads=heads, qkv_bias=False)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = GatedFeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`x` (B, N, C), `context` (B, T, D) -> (B, N, C)."""
        normed = self.self_attn_norm(x)
        x = self.self_attn(normed, normed, causal=False) + x
        x = self.cross_attn(self.cross_attn_norm(x), context, causal=False) + x
        return self.feed_forward(self.feed_forward_norm(x)) + x


class SpatialTransformer(TransformerLayer):
    """A transformer over the positions of a feature map (Rombach et al. 2022, appendix E.2.1): one layer, or `more`."""

    def __init__(self, level: int, config: UNetConfig) -> None:
        nn.Module.__init__(self)
        width = config.widths[level]
        self.norm = nn.GroupNorm(config.norm_groups, width, eps=config.transformer_norm_eps)
        self.proj_in = projection(width, config)
        self.add_parts(level, config)
        self.proj_out = projection(width, config)
        self.more = nn.ModuleList(TransformerLayer(level, config) for _ in range(config.depth_at(level) - 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`x` (B, C, H, W), `context` (B, T, D) -> (B, C, H, W)."""
        residual, height = x, x.shape[2]
        x = super().forward(to_sequence(self.proj_in, self.norm(x)), context)  # (B, HW, C)
        for layer in self.more:
            x = layer(x, context)
        return to_map(self.proj_out, x, height, residual) + residual


def projection(width: int, config: UNetConfig) -> nn.Conv2d | nn.Linear:
    """What leads into a transformer, and out of it."""
    return nn.Linear(width, width) if config.linear_projections else nn.Conv2d(width, width, 1)


def to_sequence(projection: nn.Module, x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, HW, C). A convolution sees the feature map, a linear layer the sequence."""
    if isinstance(projection, nn.Linear):
        return projection(rearrange(x, "b c h w -> b (h w) c"))
    return rearrange(projection(x), "b c h w -> b (h w) c")


def to_map(projection: nn.Module, x: Tensor, height: int, like: Tensor) -> Tensor:
    """(B, HW, C) -> (B, C, H, W), laid out in memory as `like`."""
    if isinstance(projection, nn.Linear):
        return like_layout(rearrange(projection(x), "b (h w) c -> b c h w", h=height), like)
    return projection(like_layout(rearrange(x, "b (h w) c -> b c h w", h=height), like))


def like_layout(x: Tensor, reference: Tensor) -> Tensor:
    """Lay bfloat16 `x` out in memory as `reference` is, so that one convolution kernel serves the whole network.

    Other types are laid out plainly, as in diffusers, even if the latents came with channels last (from the VAE).
    """
    channels_last = reference.is_contiguous(memory_format=torch.channels_last) and not reference.is_contiguous()
    channels_last &= x.dtype == torch.bfloat16
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class Block(nn.Module):
    """One entry of the flat block list: any of resnet, attention, downsample, upsample, in that order."""

    def __init__(
        self,
        *,
        resnet: ResnetBlock | None = None,
        attention: SpatialTransformer | None = None,
        downsample: Downsample | None = None,
        upsample: Upsample | None = None,
    ) -> None:
        super().__init__()
        self.resnet, self.attention = resnet, attention
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor, time: Tensor, context: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'). `size`: the height and width to upsample to, if there is an `upsample`."""
        if self.resnet is not None:
            x = self.resnet(x, time)
        if self.attention is not None:
            x = self.attention(x, context)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x, size)
        return x


def resnet(in_width: int, out_width: int, config: UNetConfig) -> ResnetBlock:
    return ResnetBlock(
        in_width,
        out_width,
        time_width=config.time_width,
        groups=config.norm_groups,
        eps=config.norm_eps,
        activation=config.activation,
    )


def transformer(level: int, config: UNetConfig) -> SpatialTransformer | None:
    return SpatialTransformer(level, config) if config.attention[level] else None


def down_blocks(config: UNetConfig) -> Iterator[Block]:
    """Each level: resnets, and a downsampling unless it is the last."""
    width = config.widths[0]
    for level, level_width in enumerate(config.widths):
        for _ in range(config.resnets_per_level):
            yield Block(resnet=resnet(width, level_width, config), attention=transformer(level, config))
            width = level_width
        if level < len(config.widths) - 1:
            yield Block(downsample=Downsample(width, padding=config.downsample_padding))


def middle_blocks(config: UNetConfig) -> Iterator[Block]:
    """At the lowest resolution, with a transformer even where the level has none, as in SD 1.5."""
    width = config.widths[-1]
    yield Block(resnet=resnet(width, width, config), attention=SpatialTransformer(-1, config))
    yield Block(resnet=resnet(width, width, config))


def up_blocks(config: UNetConfig) -> Iterator[Block]:
    """Each level: one resnet more than on the way down, each with a skip connection; the last block upsamples."""
    width, skip_widths = config.widths[-1], config.skip_widths
    for level, level_width in reversed(list(enumerate(config.widths))):
        for index in range(config.resnets_per_level + 1):
            upsamples = index == config.resnets_per_level and level > 0
            yield Block(
                resnet=resnet(width + skip_widths.pop(), level_width, config),
                attention=transformer(level, config),
                upsample=Upsample(level_width) if upsamples else None,
            )
            width = level_width


class UNet(nn.Module):
    """The denoiser eps(x, t, context) of Ho et al. 2020 with the cross-attention of Rombach et al. 2022.

    Stable Diffusion 1.5 at 512 x 512 pixels (R resnet, A attention, D downsample, U upsample):

        latents 64x64   down  conv_in  RA  RA  D        up  RA RA RA  -> norm_out, conv_out     width  320
                32x32              RA  RA  D                RA RA RAU                                  640
                16x16              RA  RA  D                RA RA RAU                                 1280
                 8x8               R   R                    R  R  RU                                  1280
                                          middle  RA R

    Every output on the way down, that of `conv_in` included, is a skip connection: 12 are pushed, and each of the 12
    blocks on the way up pops one, concatenated to its input along the channels.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.time_embedding = TimeEmbedding(width, config.time_width, config.activation)
        self.added_embedding = None
        if config.added_width:  # more than the text tells what to draw: see `xl.py`
            self.added_embedding = TimeEmbedding(config.added_width, config.time_width, config.activation)
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.down = nn.ModuleList(down_blocks(config))
        self.middle = nn.ModuleList(middle_blocks(config))
        self.up = nn.ModuleList(up_blocks(config))
        self.activation = ACTIVATIONS[config.activation]
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """Predict the noise in `latents` (B, C, H, W) at `timesteps` (() or (B,), 0 to 999) under `context` (B, T, D).

        Any height and width: odd sizes round up when halved, and upsampling targets the size of the next skip.
        """
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))  # (B,)
        sinusoidal = timestep_embedding(timesteps, self.config.widths[0])  # (B, widths[0])
        time = self.time_embedding(sinusoidal.to(latents.dtype))  # (B, 4 * widths[0])
        if self.added_embedding is not None:
            context, added = split_context(context, self.config.added_width)
            time = time + self.added_embedding(added)
        x = self.conv_in(latents)  # (B, widths[0], H, W)
        skips = [x]
        for block in self.down:
            x = block(x, time, context, size_of(x))
            skips.append(x)
        for block in self.middle:
            x = block(x, time, context, size_of(x))
        for block in self.up:
            x = torch.cat([x, skips.pop()], dim=1)  # (B, C + C of the skip, H, W)
            x = block(x, time, context, size_of(skips[-1] if skips else x))
        return self.conv_out(self.activation(self.norm_out(x)))  # (B, out_channels, H, W)


def split_context(context: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Context (B, T + n, D) of a model that is told more than text (`xl.py`) -> (B, T, D), and (B, width) in n rows."""
    rows = -(-width // context.shape[-1])
    return context[:, :-rows], context[:, -rows:].flatten(1)[:, :width]


def size_of(x: Tensor) -> tuple[int, int]:
    """Height and width of (B, C, H, W)."""
    return cast(tuple[int, int], tuple(x.shape[-2:]))
