"""How mistakes of the lab's table are made in diffusers' code, and clean changes that no comparison may accuse.

The table (`minisd/lab/parity/bugs.py`) has their names, and makes most of them in any code. A clean change alters a
minisd model in place.
"""

from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn


def transformer_layer(side):
    return side.model.unet.down_blocks[0].attentions[0].transformer_blocks[0]


class ScaledProcessor:
    """diffusers' plain attention, with the module's own scale."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            rearrange(part, "b n (h d) -> b h n d", h=attn.heads)
            for part in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        x = F.scaled_dot_product_attention(q, k, v, scale=attn.scale)
        return attn.to_out[0](rearrange(x, "b h n d -> b n (h d)"))


def attention_scale(side):
    attention = transformer_layer(side).attn2
    attention.scale *= 1.01
    attention.set_processor(ScaledProcessor())
    return ["unet.down.0.attention.cross_attn"]


def residual_scale(side):
    side.model.unet.up_blocks[0].resnets[0].output_scale_factor = 1 / 1.0001
    return ["unet.up.0.resnet"]


def sines_first(side):
    side.model.unet.time_proj.flip_sin_to_cos = False
    return ["unet"]


def frequency_shift(side):
    side.model.unet.time_proj.downscale_freq_shift = 1
    return ["unet"]


def time_in_float16(side):
    embedding = side.model.unet.time_proj
    embedding.forward = MethodType(lambda self, t: type(self).forward(self, t).half().float(), embedding)
    return ["unet"]


def tanh_gelu(side):
    transformer_layer(side).ff.net[0].gelu = lambda gate: F.gelu(gate, approximate="tanh")
    return ["unet.down.0.attention.feed_forward"]


def exact_gelu_in_clip(side):
    side.model.text_encoder.encoder.layers[1].mlp.activation_fn = nn.GELU()
    return ["text_encoder.layers.1.feed_forward"]


def padded_on_all_sides(side):
    down = side.model.vae.encoder.down_blocks[0].downsamplers[0]
    down.padding, down.conv.padding = 1, (1, 1)
    down.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return ["vae.encoder.down.1.conv"]


def skips_of_the_other_half(side):
    block = side.model.unet.up_blocks[1]

    def forward(self, hidden_states, res_hidden_states_tuple, *rest, **more):
        skips = tuple(skip.flip(0) for skip in res_hidden_states_tuple)
        return type(self).forward(self, hidden_states, skips, *rest, **more)

    block.forward = MethodType(forward, block)
    return ["unet"]


def no_causal_mask(side):
    attention = side.model.text_encoder.encoder.layers[0].self_attn

    def forward(self, hidden_states, attention_mask=None, **more):
        mask = torch.zeros(1, 1, hidden_states.shape[1], hidden_states.shape[1], dtype=hidden_states.dtype)
        return type(self).forward(self, hidden_states, attention_mask=mask, **{**more, "is_causal": False})

    attention.forward = MethodType(forward, attention)
    return ["text_encoder.layers.0.self_attn"]


def logvar_not_clamped(side):
    def encode(self, images, return_dict=True):
        found = type(self).encode(self, images)
        logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)[1]
        said = SimpleNamespace(mean=found.latent_dist.mean, logvar=logvar, std=torch.exp(0.5 * logvar))
        return SimpleNamespace(latent_dist=said)

    side.model.vae.encode = MethodType(encode, side.model.vae)
    return ["VAE moments"]


# Names in the table -> how to make them in diffusers' code; None: as the table does.
IN_DIFFUSERS: dict[str, Any] = {
    "eps-resnet": None,
    "eps-transformer": None,
    "eps-layernorm": None,
    "eps-vae-encoder": None,
    "eps-vae-attention": None,
    "eps-clip": None,
    "attention-scale": attention_scale,
    "attention-heads": None,
    "residual-scale": residual_scale,
    "sin-cos": sines_first,
    "frequency-shift": frequency_shift,
    "gelu-tanh": tanh_gelu,
    "clip-gelu": exact_gelu_in_clip,
    "vae-padding": padded_on_all_sides,
    "skip-order": skips_of_the_other_half,
    "no-causal-mask": no_causal_mask,
    "logvar": logvar_not_clamped,
    "one-weight": None,
    "q-k-swapped": None,
    "scaling-factor": None,
    "final-alpha": None,
    "final-alpha-by-hand": None,
    "steps-offset": None,
    "time-dtype": time_in_float16,
}

# ---- clean changes: of a minisd model, in place --------------------------------------------------------------

CLEAN: dict[str, Any] = {}


def clean(name):
    def enter(change):
        CLEAN[name] = change
        return change

    return enter


@clean("channels last")
def _(sd):
    sd.unet.to(memory_format=torch.channels_last)
    sd.vae.to(memory_format=torch.channels_last)


@clean("attention by hand, with a softmax of its own")
def _(sd):
    def forward(self, x, context, *, causal):
        q, k, v = (
            rearrange(s, "b n (h d) -> b h n d", h=self.heads) for s in (self.q(x), self.k(context), self.v(context))
        )
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu(1)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return self.out(rearrange(weights @ v / weights.sum(-1, keepdim=True), "b h n d -> b n (h d)"))

    for module in (*sd.unet.modules(), *sd.vae.modules(), *sd.text_encoder.modules()):
        if type(module).__name__ == "Attention":
            module.forward = MethodType(forward, module)


@clean("other thread counts")
def _(sd):
    def forward(self, *args, **kwargs):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            return type(self).forward(self, *args, **kwargs)
        finally:
            torch.set_num_threads(before)

    sd.unet.forward = MethodType(forward, sd.unet)


@clean("a batch that is split")
def _(sd):
    def forward(self, latents, timesteps, context):
        rows = [type(self).forward(self, x[None], timesteps, c[None]) for x, c in zip(latents, context, strict=True)]
        return torch.cat(rows)

    sd.unet.forward = MethodType(forward, sd.unet)


@clean("GroupNorm by hand, in another order of sums")
def _(sd):
    def forward(self, x):
        groups = x.reshape(len(x), self.num_groups, -1)
        mean = groups.mean(-1, keepdim=True)
        var = (groups * groups).mean(-1, keepdim=True) - mean * mean
        normed = ((groups - mean) / (var + self.eps).sqrt()).reshape(x.shape)
        shape = (1, -1, *[1] * (x.ndim - 2))
        return normed * self.weight.reshape(shape) + self.bias.reshape(shape)

    for module in sd.unet.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = MethodType(forward, module)


@clean("waves of the time embedding from a table")
def _(sd):
    import minisd.unet

    def forward(self, *args, **kwargs):
        right = minisd.unet.timestep_embedding
        minisd.unet.timestep_embedding = from_table
        try:
            return type(self).forward(self, *args, **kwargs)
        finally:
            minisd.unet.timestep_embedding = right

    def from_table(timesteps, width):
        half = width // 2
        angles = torch.arange(1000)[:, None] / 10000 ** (torch.arange(half) / half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)[timesteps]

    sd.unet.forward = MethodType(forward, sd.unet)


@clean("the halves of guidance in the other order, everywhere")
def _(sd):
    def encode_prompt(self, prompts, negatives, *rest):
        return torch.cat(type(self).encode_prompt(self, prompts, negatives, *rest).chunk(2)[::-1])

    def predict_noise(self, x, t, context, scale, rescale=0.0):
        positive, negative = self.unet(torch.cat([x, x]), t, context).chunk(2)
        return negative + scale * (positive - negative)

    sd.encode_prompt, sd.predict_noise = MethodType(encode_prompt, sd), MethodType(predict_noise, sd)
