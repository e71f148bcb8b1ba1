"""Token ids -> one vector per token: CLIP's text transformer.

In: ids (B, 77) from `tokenizer.py`. Out: (B, 77, 768), the `context` that the UNet attends to.
Next in the walk: `unet.py`.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from minisd.config import TextEncoderConfig
from minisd.layers import ACTIVATIONS, Attention


class FeedForward(nn.Module):
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, width: int, hidden_width: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.expand = nn.Linear(width, hidden_width)
        self.contract = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        return self.contract(self.activation(self.expand(x)))  # (B, T, hidden_width) in between


class TextLayer(nn.Module):
    """One pre-norm transformer layer with causal self-attention: a token attends to those before it only."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        width, eps = config.width, config.layer_norm_eps
        self.self_attn_norm = nn.LayerNorm(width, eps=eps)
        self.self_attn = Attention(width, width, heads=config.heads, qkv_bias=True)
        self.feed_forward_norm = nn.LayerNorm(width, eps=eps)
        self.feed_forward = FeedForward(width, config.hidden_width, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        normed = self.self_attn_norm(x)
        x = x + self.self_attn(normed, normed, causal=True)
        return x + self.feed_forward(self.feed_forward_norm(x))


class TextEncoder(nn.Module):
    """CLIP ViT-L/14's text transformer (Radford et al. 2021, arXiv:2103.00020, section 2.4).

    Stable Diffusion is conditioned on its last hidden states, not on the pooled vector that CLIP compares with images.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.context_length, config.width)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        # SDXL's: see `xl.py`
        self.projection = nn.Linear(config.width, config.projection, bias=False) if config.projection else None

    def forward(self, ids: Tensor, *, clip_skip: int = 0) -> Tensor:
        """Encode `ids` (B, T), T at most `context_length`, int64 -> (B, T, width).

        `clip_skip=n` leaves out the last n layers; the final norm is applied all the same. Raises ValueError for a
        prompt that is too long or a `clip_skip` that leaves no layer.
        """
        if ids.shape[-1] > self.config.context_length:
            raise ValueError(f"{ids.shape[-1]} tokens: this text encoder takes at most {self.config.context_length}")
        if not isinstance(clip_skip, int) or not 0 <= clip_skip < len(self.layers):
            raise ValueError(f"clip_skip={clip_skip}: must be a whole number from 0 to {len(self.layers) - 1}")
        return self.final_norm(self.hidden(ids, len(self.layers) - clip_skip))

    def hidden(self, ids: Tensor, layers: int) -> Tensor:
        """What the first so many layers make of `ids` (B, T): (B, T, width)."""
        positions = torch.arange(ids.shape[-1], device=ids.device)
        x = self.token_embedding(ids) + self.position_embedding(positions)  # (B, T, width)
        for layer in self.layers[:layers]:
            x = layer(x)
        return x

    def take_table(self, table: Tensor) -> None:
        """Use another token embedding (vocabulary, width), a Parameter with more rows, or fewer."""
        self.token_embedding.weight, self.token_embedding.num_embeddings = table, len(table)
        self.config = replace(self.config, vocabulary=len(table))
