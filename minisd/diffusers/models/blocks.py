"""The inner modules of diffusers' networks: minisd's layers under the names by which published code finds them.

minisd's networks are flat lists of blocks; diffusers' are trees. A tree here holds the very layers of minisd's network
(one weight is one tensor), and calls each module with the arguments that diffusers calls it with, so that hooks fire,
and a `forward` or a submodule that a program replaced is what runs. Next: `unet.py` and `vae.py`, which grow the trees.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd import layers, unet
from minisd.diffusers.models.attention_processor import Attention
from minisd.diffusers.outputs import output
from minisd.pixel.unet import PixelResnet, resampled

Modules = Sequence[nn.Module]
ACTIVATIONS = {F.silu: nn.SiLU, F.gelu: nn.GELU}


class ResnetBlock2D(nn.Module):
    """`minisd.layers.ResnetBlock`."""

    output_scale_factor, time_embedding_norm = 1.0, "default"
    upsample = downsample = None

    def __init__(self, core: layers.ResnetBlock) -> None:
        super().__init__()
        dropout = 0.0
        if isinstance(core, PixelResnet):
            self.output_scale_factor, dropout = core.scale, core.dropout
            self.time_embedding_norm = "scale_shift" if core.scale_shift else "default"
            if core.resample is not None:
                setattr(self, f"{core.resample}sample", partial(resampled, how=core.resample))
        self.in_channels, self.out_channels = core.conv1.in_channels, core.conv1.out_channels
        self.norm1, self.conv1, self.time_emb_proj = core.norm1, core.conv1, core.time
        self.norm2, self.dropout, self.conv2 = core.norm2, nn.Dropout(dropout), core.conv2
        self.nonlinearity = ACTIVATIONS[core.activation]()
        self.conv_shortcut, self.use_in_shortcut = core.shortcut, core.shortcut is not None

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W), embedded timestep (B, D) -> (B, C', H, W), or 2H or H/2."""
        residual, x = input_tensor, self.nonlinearity(self.norm1(input_tensor))
        resample = self.upsample or self.downsample
        if resample is not None:
            residual, x = resample(residual), resample(x)
        x = self.conv1(x)
        if self.time_emb_proj is not None and temb is not None:
            temb = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
            if self.time_embedding_norm == "scale_shift":
                scale, shift = temb.chunk(2, dim=1)
                x = self.norm2(x) * (1 + scale) + shift
            else:
                x = self.norm2(x + temb)
        else:
            x = self.norm2(x)
        x = self.conv2(self.dropout(self.nonlinearity(x)))
        if self.conv_shortcut is not None:  # the order in memory decides the rounding: in training diffusers' is plain
            residual = self.conv_shortcut(residual.contiguous() if self.training else residual)
        return (residual + x) / self.output_scale_factor


class Downsample2D(layers.Downsample):
    """`minisd.layers.Downsample`."""

    def __init__(self, core: layers.Downsample) -> None:
        nn.Module.__init__(self)
        self.conv, self.channels, self.use_conv = core.conv, core.conv.in_channels, True
        self.out_channels, self.padding = core.conv.out_channels, core.conv.padding[0]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


class Upsample2D(layers.Upsample):
    """`minisd.layers.Upsample`, to twice the size unless told another."""

    def __init__(self, core: layers.Upsample) -> None:
        nn.Module.__init__(self)
        self.conv, self.channels, self.use_conv = core.conv, core.conv.in_channels, True
        self.out_channels = core.conv.out_channels

    def forward(self, hidden_states: Tensor, output_size: Any = None) -> Tensor:
        height, width = output_size or (2 * hidden_states.shape[2], 2 * hidden_states.shape[3])
        return super().forward(hidden_states, (height, width))


class GEGLU(nn.Module):
    """Value times gelu(gate): the first layer of the feed-forward network."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, 4C)."""
        value, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """`minisd.unet.GatedFeedForward`."""

    def __init__(self, core: unet.GatedFeedForward) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(core.expand), nn.Dropout(0.0), core.contract])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        for layer in self.net:
            hidden_states = layer(hidden_states)
        return hidden_states


class BasicTransformerBlock(nn.Module):
    """`minisd.unet.TransformerLayer`: two attentions and a feed-forward network."""

    only_cross_attention, norm_type, pos_embed = False, "layer_norm", None
    use_ada_layer_norm = use_ada_layer_norm_zero = use_ada_layer_norm_single = use_layer_norm_ = False

    def __init__(self, core: unet.TransformerLayer) -> None:
        super().__init__()
        self.norm1, self.attn1 = core.self_attn_norm, Attention(core.self_attn, crosses=False)
        self.norm2, self.attn2 = core.cross_attn_norm, Attention(core.cross_attn, crosses=True)
        self.norm3, self.ff = core.feed_forward_norm, FeedForward(core.feed_forward)
        self.dim, self.num_attention_heads = self.attn1.query_dim, self.attn1.heads

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """(B, N, C), context (B, T, D) -> (B, N, C). `timestep` and what comes after the kwargs have no effect."""
        extra = cross_attention_kwargs or {}
        x = hidden_states
        context, mask = encoder_hidden_states, encoder_attention_mask
        own = context if self.only_cross_attention else None
        x = self.attn1(self.norm1(x), encoder_hidden_states=own, attention_mask=attention_mask, **extra) + x
        x = self.attn2(self.norm2(x), encoder_hidden_states=context, attention_mask=mask, **extra) + x
        return self.ff(self.norm3(x)) + x


class Transformer2DModel(nn.Module):
    """`minisd.unet.SpatialTransformer`."""

    is_input_continuous = True

    def __init__(self, core: unet.SpatialTransformer) -> None:
        super().__init__()
        self.use_linear_projection = isinstance(core.proj_in, nn.Linear)
        self.in_channels = self.inner_dim = core.proj_in.weight.shape[1]
        self.norm, self.proj_in = core.norm, core.proj_in
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(layer) for layer in (core, *core.more))
        self.proj_out = core.proj_out

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """(B, C, H, W), context (B, T, D) -> `.sample` (B, C, H, W)."""
        height = hidden_states.shape[2]
        x = unet.to_sequence(self.proj_in, self.norm(hidden_states))  # (B, HW, C)
        for block in self.transformer_blocks:
            x = block(
                x,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )
        x = unet.to_map(self.proj_out, x, height, hidden_states) + hidden_states  # (B, C, H, W)
        return output(return_dict, sample=x)


class ResnetStack(nn.Module):
    """Resnets, each with an attention layer behind it where there are any, then a change of resolution or none.

    Base of diffusers' block classes.
    """

    has_cross_attention = False
    gradient_checkpointing = False
    attentions: nn.ModuleList
    downsamplers: nn.ModuleList | None
    upsamplers: nn.ModuleList | None

    def __init__(self, resnets: Modules, attentions: Modules = ()) -> None:
        super().__init__()
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def attend(self, index: int, x: Tensor, text: dict[str, Any]) -> Tensor:
        """The attention behind resnet `index`: here none."""
        return x

    def resized(self, name: str, layers: Modules) -> None:
        """Register the layers that change the resolution, under diffusers' name; None where there are none."""
        setattr(self, name, nn.ModuleList(layers) if layers else None)


class AttendsToText(ResnetStack):
    """With a transformer behind each resnet."""

    has_cross_attention = True

    def attend(self, index: int, x: Tensor, text: dict[str, Any]) -> Tensor:
        attended: Tensor = self.attentions[index](x, **text, return_dict=False)[0]
        return attended


class AttendsToItself(ResnetStack):
    """With self-attention behind each resnet."""

    def attend(self, index: int, x: Tensor, text: dict[str, Any]) -> Tensor:
        return self.attentions[index](x)


class DownBlock2D(ResnetStack):
    """One level on the way down."""

    def __init__(self, resnets: Modules, attentions: Modules, downsamplers: Modules) -> None:
        super().__init__(resnets, attentions)
        self.resized("downsamplers", downsamplers)

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, **text: Any) -> Any:
        """(B, C, H, W), embedded timestep -> the same at the next level, and the skips. `text`: see the attention."""
        x, skips = hidden_states, []
        for index, resnet in enumerate(self.resnets):
            x = self.attend(index, resnet(x, temb), text)
            skips.append(x)
        for downsampler in self.downsamplers or ():
            x = downsampler(x, temb) if isinstance(downsampler, ResnetBlock2D) else downsampler(x)
            skips.append(x)
        return x, tuple(skips)


class CrossAttnDownBlock2D(AttendsToText, DownBlock2D):
    """One level on the way down, with attention to the text."""


class AttnDownBlock2D(AttendsToItself, DownBlock2D):
    """One level on the way down, with self-attention."""


class UNetMidBlock2DCrossAttn(ResnetStack):
    """The middle of the UNet."""

    has_cross_attention = True

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, **text: Any) -> Tensor:
        """(B, C, H, W), embedded timestep -> (B, C, H, W)."""
        x = self.resnets[0](hidden_states, temb)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            x = resnet(attention(x, **text, return_dict=False)[0], temb)
        return x


class UpBlock2D(ResnetStack):
    """One level on the way up."""

    def __init__(self, resnets: Modules, attentions: Modules, upsamplers: Modules) -> None:
        super().__init__(resnets, attentions)
        self.resized("upsamplers", upsamplers)

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: Any = None,
        **text: Any,
    ) -> Tensor:
        """(B, C, H, W), skips (last first), embedded timestep -> the same at the next level."""
        x = hidden_states
        for index, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, res_hidden_states_tuple[-1 - index]], dim=1), temb)
            x = self.attend(index, x, text)
        for upsampler in self.upsamplers or ():
            x = upsampler(x, temb if isinstance(upsampler, ResnetBlock2D) else upsample_size)
        return x


class CrossAttnUpBlock2D(AttendsToText, UpBlock2D):
    """One level on the way up, with attention to the text."""


class AttnUpBlock2D(AttendsToItself, UpBlock2D):
    """One level on the way up, with self-attention."""


class DownEncoderBlock2D(ResnetStack):
    """One level of the VAE's encoder."""

    def __init__(self, resnets: Modules, downsamplers: Modules) -> None:
        super().__init__(resnets)
        self.resized("downsamplers", downsamplers)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H/2, W/2), or the same size on the last level."""
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states, None)
        for downsampler in self.downsamplers or ():
            hidden_states = downsampler(hidden_states)
        return hidden_states


class UpDecoderBlock2D(ResnetStack):
    """One level of the VAE's decoder."""

    def __init__(self, resnets: Modules, upsamplers: Modules) -> None:
        super().__init__(resnets)
        self.resized("upsamplers", upsamplers)

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C', 2H, 2W), or the same size on the last level."""
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states, temb)
        for upsampler in self.upsamplers or ():
            hidden_states = upsampler(hidden_states)
        return hidden_states


class UNetMidBlock2D(ResnetStack):
    """The middle of either half of the VAE, or of a UNet of pixels: self-attention, if any, between two resnets."""

    @classmethod
    def of(cls, middle: nn.ModuleList) -> "UNetMidBlock2D":
        """From minisd's list of a resnet, attention, a resnet."""
        first, attention, second = cast(tuple[layers.ResnetBlock, layers.PixelAttention, layers.ResnetBlock], middle)
        attn = Attention(attention.attn, crosses=False, group_norm=attention.norm, residual=True)
        return cls([ResnetBlock2D(first), ResnetBlock2D(second)], [attn])

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        x = self.resnets[0](hidden_states, temb)
        for attention in getattr(self, "attentions", ()):
            x = attention(x, temb=temb)
        return self.resnets[1](x, temb)
