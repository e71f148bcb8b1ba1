"""diffusers' `Attention`, and the processors that compute it: where published attention editing takes hold.

The weights are those of minisd's `Attention`: the same linear layers under diffusers' names. `Attention.forward` hands
everything to its processor, and a program may put another processor, or another forward, in its place.
"""

import inspect
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisd import layers


class AttnProcessor2_0:
    """Attention by torch's fused kernel: diffusers' default, and minisd's arithmetic."""

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C), or (B, C, H, W) in the VAE, with context (B, M, D) -> the shape that came in."""
        x = sequence(attn, hidden_states)  # (B, N, C)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (split_heads(y, attn.heads) for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(x))
        mask = None if mask is None else mask.view(len(x), attn.heads, -1, mask.shape[-1])
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, h, N, d)
        return finished(attn, x.transpose(1, 2).reshape(len(x), -1, attn.inner_dim), hidden_states)


class AttnProcessor:
    """Attention by matrix products, through `get_attention_scores`: for programs that want to see the weights."""

    def __call__(
        self,
        attn: "Attention",
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As `AttnProcessor2_0`; rounds differently."""
        x = sequence(attn, hidden_states)  # (B, N, C)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(x))
        q, k, v = (attn.head_to_batch_dim(y) for y in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
        weights = attn.get_attention_scores(q, k, attention_mask)  # (B h, N, M)
        return finished(attn, attn.batch_to_head_dim(torch.bmm(weights, v)), hidden_states)


def sequence(attn: "Attention", x: Tensor) -> Tensor:
    """Feature maps (B, C, H, W) -> (B, HW, C), normalised where the layer has a norm of its own; sequences stay."""
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    return x if attn.group_norm is None else attn.group_norm(x.transpose(1, 2)).transpose(1, 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, h, N, C / h)."""
    return x.view(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2)


def finished(attn: "Attention", x: Tensor, given: Tensor) -> Tensor:
    """Output projection of (B, N, C), in the shape of what was `given`, plus the residual where there is one."""
    for layer in attn.to_out:
        x = layer(x)
    if given.ndim == 4:
        x = x.transpose(-1, -2).reshape(given.shape)
    return (x + given if attn.residual_connection else x) / attn.rescale_output_factor


class Attention(nn.Module):
    """`minisd.layers.Attention` under diffusers' names, with the settings that processors read."""

    upcast_attention = upcast_softmax = only_cross_attention = fused_projections = is_causal = False
    spatial_norm = norm_cross = norm_q = norm_k = added_kv_proj_dim = None
    dropout = 0.0

    def __init__(
        self,
        core: layers.Attention,
        *,
        crosses: bool,
        group_norm: nn.GroupNorm | None = None,
        residual: bool = False,
        scale: float = 1.0,
    ) -> None:
        """`crosses`: keys and values come from a context. `group_norm`, `residual`, `scale`: as in `PixelAttention`."""
        super().__init__()
        self.is_cross_attention, self.residual_connection, self.rescale_output_factor = crosses, residual, scale
        self.use_bias = core.q.bias is not None
        self.heads = self.sliceable_head_dim = core.heads
        self.query_dim = self.inner_dim = self.inner_kv_dim = self.out_dim = core.q.out_features
        self.cross_attention_dim = core.k.in_features
        self.scale = (self.inner_dim // self.heads) ** -0.5
        self.group_norm = group_norm
        self.to_q, self.to_k, self.to_v = core.q, core.k, core.v
        self.to_out = nn.ModuleList([core.out, nn.Dropout(0.0)])
        self.set_processor(AttnProcessor2_0())

    def set_processor(self, processor: Any) -> None:
        """Compute attention by `processor(attn, hidden_states, encoder_hidden_states=..., attention_mask=...)`.

        Raises TypeError for what cannot be called.
        """
        if not callable(processor):
            raise TypeError(f"processor={processor!r}: must be callable, as AttnProcessor() is")
        self._modules.pop("processor", None)  # a processor with weights was a submodule
        self.processor = processor

    def get_processor(self) -> Any:
        return self.processor

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """(B, N, C) with context (B, M, D), or with itself -> (B, N, C), by the processor.

        Of `cross_attention_kwargs` the processor gets those that it takes; for others there is a warning.
        """
        known = self.known_to_processor(cross_attention_kwargs) if cross_attention_kwargs else {}
        return self.processor(
            self, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **known
        )

    def known_to_processor(self, given: dict[str, Any]) -> dict[str, Any]:
        """Those of the arguments given that the processor takes, with a warning for the others."""
        taken = inspect.signature(self.processor.__call__).parameters
        unknown = [name for name in given if name not in taken]
        if unknown:
            kind = type(self.processor).__name__
            warnings.warn(f"cross_attention_kwargs: {', '.join(unknown)} not taken by {kind}, ignored", stacklevel=3)
        return {name: value for name, value in given.items() if name in taken}

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """(B, N, C) -> (B h, N, C / h), or (B, h, N, C / h) for `out_dim=4`."""
        split = tensor.reshape(len(tensor), -1, self.heads, tensor.shape[-1] // self.heads).permute(0, 2, 1, 3)
        return split.flatten(0, 1) if out_dim == 3 else split

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """(B h, N, C / h) -> (B, N, C)."""
        return tensor.unflatten(0, (-1, self.heads)).permute(0, 2, 1, 3).flatten(2)

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """softmax(scale q k^T + mask): queries (B h, N, d), keys (B h, M, d) -> attention weights (B h, N, M)."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.float(), key.float()
        shape = (len(query), query.shape[1], key.shape[1])
        # One call for product, scale and mask, as in diffusers: the rounding depends on it.
        added = query.new_empty(shape) if attention_mask is None else attention_mask
        beta = 0 if attention_mask is None else 1
        scores = torch.baddbmm(added, query, key.transpose(-1, -2), beta=beta, alpha=self.scale)
        return (scores.float() if self.upcast_softmax else scores).softmax(dim=-1).to(dtype)

    def prepare_attention_mask(
        self, attention_mask: Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Tensor | None:
        """A mask (B, 1, M) that is added to scores -> (B h, 1, M), or (B, h, 1, M) for `out_dim=4`."""
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            attention_mask = F.pad(attention_mask, (0, target_length), value=0.0)
        if out_dim == 4:
            return attention_mask.unsqueeze(1).repeat_interleave(self.heads, dim=1)
        repeats = len(attention_mask) < batch_size * self.heads
        return attention_mask.repeat_interleave(self.heads, dim=0) if repeats else attention_mask


class HasAttention(nn.Module):
    """Networks whose attention processors can be listed and replaced."""

    def attentions_by_name(self) -> dict[str, Any]:
        """Every module with a processor, by its name and ".processor"."""
        named = ((name, module) for name, module in self.named_modules() if hasattr(module, "set_processor"))
        return {f"{name}.processor": module for name, module in named}

    @property
    def attn_processors(self) -> dict[str, Any]:
        """The processors by name: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor", ..."""
        return {name: module.get_processor() for name, module in self.attentions_by_name().items()}

    def set_attn_processor(self, processor: Any) -> None:
        """One processor for all attention layers, or a dict of one for each of `attn_processors`' names.

        Raises ValueError for a dict that names other layers.
        """
        layers = self.attentions_by_name()
        if isinstance(processor, dict) and processor.keys() != layers.keys():
            wrong = ", ".join(sorted(processor.keys() ^ layers.keys())[:3])
            raise ValueError(f"{len(processor)} processors for {len(layers)} attention layers: see {wrong}")
        for name, module in layers.items():
            module.set_processor(processor[name] if isinstance(processor, dict) else processor)

    def set_default_attn_processor(self) -> None:
        self.set_attn_processor(AttnProcessor())
