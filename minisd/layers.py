"""The blocks that the UNet, the VAE and the text encoder share.

Feature maps are (B, C, H, W), sequences (B, N, C). Nothing here has a default for a number that changes the result: the
models pass them from `config.py`, which is next in the walk.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "quick_gelu": quick_gelu}


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762).

    Queries come from `x`, keys and values from `context`: cross-attention. In self-attention `context` is `x`.
    """

    attend = staticmethod(F.scaled_dot_product_attention)  # softmax(q k^T / sqrt(d)) v; an engine may have its own

    def __init__(self, width: int, context_width: int, *, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=qkv_bias)
        self.k = nn.Linear(context_width, width, bias=qkv_bias)
        self.v = nn.Linear(context_width, width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, *, causal: bool) -> Tensor:
        """`x` (B, N, C), `context` (B, M, D) -> (B, N, C). `causal`: position n attends to positions 0 to n only."""
        q, k, v = self.q(x), self.k(context), self.v(context)  # (B, N, C), (B, M, C), (B, M, C)
        # The channels are split into heads of size d = C / h, which attend independently.
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.heads) for y in (q, k, v))  # (B, h, N or M, d)
        x = self.attend(q, k, v, is_causal=causal)  # (B, h, N, d)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))  # (B, N, C)


class PixelAttention(nn.Module):
    """Self-attention over all positions of a feature map: in the VAE with one head, at the lowest resolution.

    `groups=None`: no norm before it. The sum with the residual is divided by `scale`.
    """

    def __init__(self, width: int, *, heads: int, groups: int | None, eps: float, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.norm = None if groups is None else nn.GroupNorm(groups, width, eps=eps)
        self.attn = Attention(width, width, heads=heads, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        # Flattening before the norm, and back by `reshape`, gives the strides that diffusers has. Values are the same
        # either way, but torch chooses its kernels, and with them the rounding, by the strides.
        sequence = x.flatten(2)  # (B, C, HW)
        sequence = (sequence if self.norm is None else self.norm(sequence)).transpose(1, 2)  # (B, HW, C)
        out = self.attn(sequence, sequence, causal=False)
        out = out.transpose(1, 2).reshape(x.shape) + x  # (B, C, H, W)
        return out if self.scale == 1 else out / self.scale


class ResnetBlock(nn.Module):
    """Two convolutions and a residual connection (He et al. 2015), with timestep conditioning between them (Ho et al.
    2020): pre-activation, GroupNorm -> activation -> convolution, twice.

    `time_width=None` makes the VAE's block, which has no timestep.
    """

    def __init__(
        self, in_width: int, out_width: int, *, time_width: int | None, groups: int, eps: float, activation: str
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm1 = nn.GroupNorm(groups, in_width, eps=eps)
        self.conv1 = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.time = nn.Linear(time_width, out_width) if time_width else None
        self.norm2 = nn.GroupNorm(groups, out_width, eps=eps)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.shortcut = nn.Conv2d(in_width, out_width, 1) if in_width != out_width else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """`x` (B, in_width, H, W), `time` (B, time_width) -> (B, out_width, H, W)."""
        residual = self.shortcut(x) if self.shortcut else x
        x = self.conv1(self.activation(self.norm1(x)))  # (B, out_width, H, W)
        if self.time is not None and time is not None:
            x = x + rearrange(self.time(self.activation(time)), "b c -> b c 1 1")  # one bias a channel
        x = self.conv2(self.activation(self.norm2(x)))
        return residual + x


class Downsample(nn.Module):
    """Half the height and width, by a convolution with stride 2.

    `padding=1` pads all four sides (the UNet). `padding=0` pads the right and the bottom only (the VAE): so the weights
    were trained, and any other padding shifts the image.
    """

    def __init__(self, width: int, *, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)) in the UNet, (B, C, H/2, W/2) in the VAE."""
        if self.conv.padding == (0, 0):
            x = F.pad(x, (0, 1, 0, 1))  # (B, C, H+1, W+1)
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a convolution: no checkerboard, as a transposed convolution would leave."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W) -> (B, C, *size)."""
        return self.conv(F.interpolate(laid_out(x), size=size, mode="nearest"))


def laid_out(x: Tensor) -> Tensor:
    """`x` as diffusers upsamples it: plain in memory from a batch of 64 on, which decides how convolutions round."""
    return x.contiguous() if len(x) >= 64 else x
