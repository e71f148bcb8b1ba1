"""Other people's implementations, in other module structures, and the functions that `python:` finds them by.

Each has a sound form and one with a mistake. Weights come from the small model.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.lab.parity.small import small_model


class FusedAttention(nn.Module):
    """Self-attention with one matrix for q, k and v, and its own way through heads."""

    def __init__(self, attention: nn.Module, wrong: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(attention.q.in_features, 3 * attention.q.out_features, bias=False)
        self.qkv.weight.data = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]).detach()
        self.output, self.n_heads, self.wrong = attention.out, attention.heads, wrong

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.einsum("bhnd,bhmd->bhnm", qkv[0], qkv[1])
        scores = scores / (width if self.wrong else width / self.n_heads) ** 0.5
        out = torch.einsum("bhnm,bhmd->bhnd", F.softmax(scores, -1), qkv[2])
        return self.output(out.permute(0, 2, 1, 3).reshape(batch, length, width))


NAMES = {
    "": "unet.down.0.attention.self_attn",
    "output": "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
}


def fused_attention():
    return FusedAttention(small_model().unet.down[0].attention.self_attn, wrong=False), NAMES


def wrong_fused_attention():
    return FusedAttention(small_model().unet.down[0].attention.self_attn, wrong=True), NAMES


class OtherResnet(nn.Module):
    """A ResNet block in two halves, as one might write it after the paper."""

    def __init__(self, block: nn.Module, eps: float) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(32, block.conv1.in_channels, eps=eps), nn.SiLU(), block.conv1)
        self.second = nn.Sequential(nn.GroupNorm(32, block.conv2.in_channels, eps=1e-5), nn.SiLU(), block.conv2)
        self.first[0].load_state_dict(block.norm1.state_dict())
        self.second[0].load_state_dict(block.norm2.state_dict())
        self.embed, self.skip = block.time, block.shortcut

    def forward(self, h: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        out = self.second(self.first(h) + self.embed(F.silu(emb))[..., None, None])
        return out + (h if self.skip is None else self.skip(h))


RESNET_NAMES = {
    "": "unet.down.0.resnet",
    "first.0": "unet.down.0.resnet.norm1",
    "first.2": "unet.down.0.resnet.conv1",
    "embed": "unet.down.0.resnet.time",
    "second.0": "unet.down.0.resnet.norm2",
    "second.2": "unet.down.0.resnet.conv2",
}


def resnet():
    return OtherResnet(small_model().unet.down[0].resnet, eps=1e-5), RESNET_NAMES


def wrong_resnet():
    return OtherResnet(small_model().unet.down[0].resnet, eps=1e-6), RESNET_NAMES


def strange_names():
    return OtherResnet(small_model().unet.down[0].resnet, eps=1e-5), {"": "unet.nowhere"}


def no_names():
    return OtherResnet(small_model().unet.down[0].resnet, eps=1e-5)


def misfit():
    return nn.Linear(3, 3), {"": "unet.down.0.resnet"}


# ---- CLIP's text encoder in NumPy ------------------------------------------------------------------------


@functools.cache
def clip_weights():
    return small_model().text_encoder.state_dict()


def numpy_clip(inputs, *, causal=True, narrow=False):
    """Tokens -> a trace: the context, and what every layer says."""
    weights = {name: tensor.numpy() for name, tensor in clip_weights().items()}
    assert not any(":" in name for name in inputs)  # a function gets the inputs of stages, not those of modules
    wide = inputs["noise"].dtype == torch.float64 and not narrow
    kind = np.float64 if wide else np.float32
    weights = {name: array.astype(kind) for name, array in weights.items()}
    ids = inputs["tokens"].numpy()
    x = weights["token_embedding.weight"][ids] + weights["position_embedding.weight"]
    told = {}
    for layer in range(2):
        told[f"text/text_encoder.layers.{layer}:0"] = x
        x = text_layer(x, f"layers.{layer}.", weights, causal)
        told[f"text/text_encoder.layers.{layer}"] = x
    told["text/context"] = layer_norm(x, "final_norm", weights)
    return {name: torch.from_numpy(np.ascontiguousarray(array.astype(kind))) for name, array in told.items()}


def numpy_clip_without_mask(inputs):
    return numpy_clip(inputs, causal=False)


def numpy_clip_in_float32(inputs):
    return numpy_clip(inputs, narrow=True)


def text_layer(x, at, w, causal):
    x = x + attention(layer_norm(x, f"{at}self_attn_norm", w), f"{at}self_attn.", w, causal)
    hidden = linear(layer_norm(x, f"{at}feed_forward_norm", w), f"{at}feed_forward.expand", w)
    return x + linear(hidden / (1 + np.exp(-1.702 * hidden)), f"{at}feed_forward.contract", w)


def layer_norm(x, name, w):
    centred = x - x.mean(-1, keepdims=True)
    scale = np.sqrt((centred * centred).mean(-1, keepdims=True) + np.asarray(1e-5, x.dtype))
    return centred / scale * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, name, w):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attention(x, at, w, causal):
    """One head is all that the small model has."""
    q, k, v = (linear(x, f"{at}{name}", w) for name in "qkv")
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(np.asarray(q.shape[-1], x.dtype))
    if causal:
        scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return linear(raised / raised.sum(-1, keepdims=True) @ v, f"{at}out", w)


def fails(inputs):
    raise ValueError("not today")


def says_nothing(inputs):
    return {"hello": torch.zeros(1)}


NOT_A_FUNCTION = 3


# ---- the same ResNet block, with nothing but the whole named ---------------------------------------------


def resnet_without_names():
    return resnet()[0], {"": "unet.down.0.resnet"}


def wrong_resnet_without_names():
    return wrong_resnet()[0], {"": "unet.down.0.resnet"}


def scaled_resnet_without_names():
    """The same function, computed another way: what one weight is multiplied by is divided away behind it."""
    block = ScaledResnet(small_model().unet.down[0].resnet, eps=1e-5)
    return block, {"": "unet.down.0.resnet"}


class ScaledResnet(OtherResnet):
    def __init__(self, block: nn.Module, eps: float) -> None:
        super().__init__(block, eps)
        self.embed = nn.Linear(block.time.in_features, block.time.out_features)
        self.embed.weight.data = block.time.weight.data * 2
        self.embed.bias.data = block.time.bias.data * 2

    def forward(self, h: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        out = self.second(self.first(h) + self.embed(F.silu(emb))[..., None, None] / 2)
        return out + (h if self.skip is None else self.skip(h))


def one_weight_off_without_names():
    block, names = resnet_without_names()
    block.first[2].weight.data = block.first[2].weight.data.clone()
    block.first[2].weight.data[0, 0, 0, 0] += 1e-6
    return block, names
