"""Noisy pixels, timestep, perhaps a class -> noise prediction: the UNet without text, as a flat list of blocks.

In: pictures (B, C, H, W), timesteps, class labels. Out: the predicted noise, shaped as the pictures. What Stable
Diffusion's UNet (`minisd/unet.py`) has and this one has not: transformers with cross-attention.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd.layers import Downsample, PixelAttention, ResnetBlock, Upsample, laid_out
from minisd.pixel.config import PixelUNetConfig
from minisd.unet import TimeEmbedding, size_of


def timestep_embedding(timesteps: Tensor, width: int, *, cosines_first: bool, shift: float) -> Tensor:
    """Sinusoidal timestep embedding, (B,) -> (B, width) float32: `minisd.unet`'s has cosines first and no shift."""
    half = width // 2
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / (half - shift)
    angles = timesteps[:, None].float() * torch.exp(exponents)[None, :]  # (B, width/2)
    waves = [torch.sin(angles), torch.cos(angles)]
    return torch.cat(waves[::-1] if cosines_first else waves, dim=-1)  # (B, width)


class PixelResnet(ResnetBlock):
    """`ResnetBlock` with the options of pixel models: the timestep as scale and shift (Dhariwal & Nichol 2021, section
    4), dropout, another resolution ("up", "down": without a convolution, on both branches), a divided sum.
    """

    def __init__(
        self, in_width: int, out_width: int, config: PixelUNetConfig, *, resample: str | None = None, scale: float = 1.0
    ) -> None:
        super().__init__(
            in_width,
            out_width,
            time_width=config.time_width,
            groups=config.norm_groups,
            eps=config.norm_eps,
            activation=config.activation,
        )
        self.scale_shift, self.dropout, self.resample, self.scale = config.scale_shift, config.dropout, resample, scale
        if config.scale_shift:
            self.time = nn.Linear(config.time_width, 2 * out_width)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`x` (B, in_width, H, W), `time` (B, time_width) -> (B, out_width, H, W), or 2H or H/2."""
        assert self.time is not None and time is not None
        residual, x = x, self.activation(self.norm1(x))
        residual, x = resampled(residual, self.resample), resampled(x, self.resample)
        x = self.conv1(x)
        time = self.time(self.activation(time))[:, :, None, None]  # (B, out_width or 2 out_width, 1, 1)
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            x = self.norm2(x) * (1 + scale) + shift
        else:
            x = self.norm2(x + time)
        x = self.conv2(F.dropout(self.activation(x), self.dropout, self.training))
        residual = self.shortcut(residual) if self.shortcut else residual
        return residual + x if self.scale == 1 else (residual + x) / self.scale


def resampled(x: Tensor, how: str | None) -> Tensor:
    """Twice the height and width by repetition ("up"), half of it by averages ("down"), or `x` itself."""
    if how is None:
        return x
    return F.interpolate(laid_out(x), scale_factor=2.0, mode="nearest") if how == "up" else F.avg_pool2d(x, 2, 2)


class PixelBlock(nn.Module):
    """One entry of the flat block list: any of resnet, attention, downsample, upsample, in that order."""

    def __init__(
        self,
        *,
        resnet: PixelResnet | None = None,
        attention: PixelAttention | None = None,
        downsample: Downsample | None = None,
        upsample: Upsample | PixelResnet | None = None,
    ) -> None:
        super().__init__()
        self.resnet, self.attention = resnet, attention
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor, time: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'). `size`: the height and width to upsample to, if there is an `upsample`."""
        if self.resnet is not None:
            x = self.resnet(x, time)
        if self.attention is not None:
            x = self.attention(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if isinstance(self.upsample, Upsample):
            x = self.upsample(x, size)
        elif self.upsample is not None:
            x = self.upsample(x, time)
        return x


def attention(width: int, config: PixelUNetConfig, *, there: bool = True) -> PixelAttention | None:
    if not there:
        return None
    return PixelAttention(width, heads=config.heads(width), groups=config.norm_groups, eps=config.norm_eps, scale=1.0)


def down_blocks(config: PixelUNetConfig) -> Iterator[PixelBlock]:
    """Each level: resnets, with attention where there is any, and a downsampling unless it is the last."""
    width = config.widths[0]
    for level, (level_width, attends) in enumerate(zip(config.widths, config.down_attention, strict=True)):
        for _ in range(config.resnets_per_level):
            yield PixelBlock(
                resnet=PixelResnet(width, level_width, config), attention=attention(level_width, config, there=attends)
            )
            width = level_width
        if level < len(config.widths) - 1:
            if resamples_by_resnet(config.downsample, attends):
                yield PixelBlock(resnet=PixelResnet(width, width, config, resample="down"))
            else:
                yield PixelBlock(downsample=Downsample(width, padding=config.downsample_padding))


def resamples_by_resnet(how: str, attends: bool) -> bool:
    """A quirk of diffusers, which files rely on: only levels with attention obey `downsample` and `upsample`."""
    return attends and how == "resnet"


def middle_blocks(config: PixelUNetConfig) -> Iterator[PixelBlock]:
    """At the lowest resolution: a resnet, attention, a resnet."""
    width, scale = config.widths[-1], config.middle_scale
    attends = None
    if config.middle_attention:
        attends = PixelAttention(
            width, heads=config.heads(width), groups=config.middle_attention_groups, eps=config.norm_eps, scale=scale
        )
    yield PixelBlock(resnet=PixelResnet(width, width, config, scale=scale), attention=attends)
    yield PixelBlock(resnet=PixelResnet(width, width, config, scale=scale))


def up_blocks(config: PixelUNetConfig) -> Iterator[PixelBlock]:
    """Each level: one resnet more than on the way down, each with a skip connection; the last block upsamples."""
    width, skip_widths = config.widths[-1], config.skip_widths
    levels = reversed(list(enumerate(config.widths)))
    for (level, level_width), attends in zip(levels, config.up_attention, strict=True):
        for index in range(config.resnets_per_level + 1):
            upsample: Upsample | PixelResnet | None = None
            if index == config.resnets_per_level and level > 0:
                by_resnet = resamples_by_resnet(config.upsample, attends)
                upsample = (
                    PixelResnet(level_width, level_width, config, resample="up") if by_resnet else Upsample(level_width)
                )
            yield PixelBlock(
                resnet=PixelResnet(width + skip_widths.pop(), level_width, config),
                attention=attention(level_width, config, there=attends),
                upsample=upsample,
            )
            width = level_width


class PixelUNet(nn.Module):
    """The denoiser eps(x, t) of Ho et al. 2020, eps(x, t, y) with a class y.

    The CIFAR-10 model of that paper (R resnet, A attention, D downsample, U upsample):

        pixels  32x32   down  conv_in  R  R  D         up  R  R  R  -> norm_out, conv_out     width 128
                16x16              RA RA D                 RA RA RAU                                256
                 8x8               R  R  D                 R  R  RU                                 256
                 4x4               R  R                    R  R  RU                                 256
                                          middle  RA R

    A class is added to the embedded timestep, and so reaches every resnet.
    """

    def __init__(self, config: PixelUNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.time_embedding = TimeEmbedding(width, config.time_width, "silu")
        self.class_embedding: nn.Module | None = None
        if config.class_embedding == "table":
            assert config.classes is not None
            self.class_embedding = nn.Embedding(config.classes, config.time_width)
        elif config.class_embedding == "timestep":
            self.class_embedding = TimeEmbedding(width, config.time_width, "silu")
        self.down = nn.ModuleList(down_blocks(config))
        self.middle = nn.ModuleList(middle_blocks(config) if config.middle else ())
        self.up = nn.ModuleList(up_blocks(config))
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def embed(self, timesteps: Tensor, labels: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Timesteps (B,) and class labels (B,), or (B, time_width) for "identity" -> (B, time_width)."""
        config = self.config
        if (labels is None) != (config.class_embedding is None):
            state = "needs" if labels is None else "has no classes, and takes no"
            raise ValueError(f"this UNet {state} class labels")

        def sinusoidal(numbers: Tensor) -> Tensor:
            return timestep_embedding(
                numbers, config.widths[0], cosines_first=config.cosines_first, shift=config.frequency_shift
            ).to(dtype)

        time = self.time_embedding(sinusoidal(timesteps))
        if labels is None:
            return time
        if config.class_embedding == "identity":
            return time + labels.to(dtype)
        assert self.class_embedding is not None
        return time + self.class_embedding(labels if config.class_embedding == "table" else sinusoidal(labels))

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the noise in `x` (B, C, H, W) at `timesteps` (() or (B,)) under class `labels` (B,).

        Raises ValueError for labels that are missing, or that the model has no use for.
        """
        timesteps = torch.as_tensor(timesteps, device=x.device).expand(len(x))  # (B,)
        time = self.embed(timesteps, labels, x.dtype)  # (B, time_width)
        if self.config.center_input:
            x = 2 * x - 1.0
        x = self.conv_in(x)  # (B, widths[0], H, W)
        skips = [x]
        for block in self.down:
            x = block(x, time, size_of(x))
            skips.append(x)
        for block in self.middle:
            x = block(x, time, size_of(x))
        for block in self.up:
            x = torch.cat([x, skips.pop()], dim=1)  # (B, C + C of the skip, H, W)
            x = block(x, time, size_of(skips[-1] if skips else x))
        return self.conv_out(F.silu(self.norm_out(x)))  # (B, out_channels, H, W)
