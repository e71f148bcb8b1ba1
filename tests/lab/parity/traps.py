"""Mistakes planted in copies of diffusers' modules, and clean changes that no comparison may accuse.

`minisd/lab/parity/bugs.py` has the mistakes for copies of minisd's. A trap changes a copy in place and returns the
names that a comparison has to come up with; a clean change returns nothing.
"""

import copy
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from minisd.lab.parity.verdict import DIFFERENT, PRECISION

TRAPS: dict[str, Any] = {}
WORDS: dict[str, str] = {}
CLEAN: dict[str, Any] = {}


def trap(name, word=DIFFERENT):
    def enter(plant):
        TRAPS[name], WORDS[name] = plant, word
        return plant

    return enter


def clean(name):
    def enter(change):
        CLEAN[name] = change
        return change

    return enter


def copied(pipeline):
    """A pipeline with networks and a scheduler of its own."""
    twin = copy.copy(pipeline)
    for part in ("text_encoder", "unet", "vae", "scheduler"):
        twin.__dict__[part] = copy.deepcopy(getattr(pipeline, part))
    return twin


def transformer(pipeline):
    return pipeline.unet.down_blocks[0].attentions[0]


def layer(pipeline):
    return transformer(pipeline).transformer_blocks[0]


@trap("eps of a UNet ResNet")
def _(p):
    p.unet.down_blocks[0].resnets[0].norm1.eps = 1e-6
    return ["unet.down.0.resnet.norm1"]


@trap("eps of a transformer's GroupNorm")
def _(p):
    transformer(p).norm.eps = 1e-5
    return ["unet.down.0.attention.norm"]


@trap("eps of a LayerNorm")
def _(p):
    layer(p).norm3.eps = 1e-6
    return ["unet.down.0.attention.feed_forward_norm"]


@trap("eps of the VAE's encoder")
def _(p):
    p.vae.encoder.mid_block.resnets[0].norm1.eps = 1e-5
    return ["vae.encoder.middle.0.norm1"]


@trap("eps of the VAE's attention")
def _(p):
    p.vae.decoder.mid_block.attentions[0].group_norm.eps = 1e-5
    return ["vae.decoder.middle.1.norm"]


@trap("eps of CLIP's final norm")
def _(p):
    p.text_encoder.final_layer_norm.eps = 1e-6
    return ["text_encoder.final_norm"]


@trap("attention scale")
def _(p):
    layer(p).attn2.scale *= 1.01
    layer(p).attn2.set_processor(ScaledProcessor())
    return ["unet.down.0.attention.cross_attn"]


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


@trap("heads halved")
def _(p):
    layer(p).attn1.heads //= 2
    return ["unet.down.0.attention.self_attn"]


@trap("residual scale 1.0001")
def _(p):
    p.unet.up_blocks[0].resnets[0].output_scale_factor = 1 / 1.0001
    return ["unet.up.0.resnet"]


@trap("sines before cosines")
def _(p):
    p.unet.time_proj.flip_sin_to_cos = False
    return ["unet"]


@trap("frequency shift 1")
def _(p):
    p.unet.time_proj.downscale_freq_shift = 1
    return ["unet"]


@trap("tanh GELU")
def _(p):
    layer(p).ff.net[0].gelu = lambda gate: F.gelu(gate, approximate="tanh")
    return ["unet.down.0.attention.feed_forward"]


@trap("exact GELU in CLIP")
def _(p):
    p.text_encoder.encoder.layers[1].mlp.activation_fn = nn.GELU()
    return ["text_encoder.layers.1.feed_forward"]


@trap("VAE padded on all sides")
def _(p):
    down = p.vae.encoder.down_blocks[0].downsamplers[0]
    down.padding, down.conv.padding = 1, (1, 1)
    down.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return ["vae.encoder.down.1.conv"]


@trap("skips in the wrong order")
def _(p):
    block = p.unet.up_blocks[1]
    right = type(block).forward

    def forward(self, hidden_states, res_hidden_states_tuple, *rest, **more):
        return right(self, hidden_states, tuple(skip.flip(0) for skip in res_hidden_states_tuple), *rest, **more)

    block.forward = MethodType(forward, block)
    return ["unet"]


@trap("no causal mask")
def _(p):
    attention = p.text_encoder.encoder.layers[0].self_attn
    right = type(attention).forward

    def forward(self, hidden_states, attention_mask=None, **more):
        mask = torch.zeros(1, 1, hidden_states.shape[1], hidden_states.shape[1], dtype=hidden_states.dtype)
        return right(self, hidden_states, attention_mask=mask, **{**more, "is_causal": False})

    attention.forward = MethodType(forward, attention)
    return ["text_encoder.layers.0.self_attn"]


@trap("logvar not clamped")
def _(p):
    def encode(self, images, return_dict=True):
        found = type(self).encode(self, images)
        logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)[1]
        said = SimpleNamespace(mean=found.latent_dist.mean, logvar=logvar, std=torch.exp(0.5 * logvar))
        return SimpleNamespace(latent_dist=said)

    p.vae.encode = MethodType(encode, p.vae)
    return ["VAE moments"]


@trap("one weight off by a millionth")
def _(p):
    with torch.no_grad():
        p.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v.weight[0, 0] += 1e-6
    return ["unet.middle.0.attention.cross_attn.v"]


@trap("weights of equal shape swapped")
def _(p):
    attention = layer(p).attn1
    attention.to_q, attention.to_k = attention.to_k, attention.to_q
    return ["unet.down.0.attention.self_attn.q", "unet.down.0.attention.self_attn.k"]


@trap("another latent scaling")
def _(p):
    p.vae.register_to_config(scaling_factor=0.18216)
    return ["VAE input"]


@trap("final alpha 1")
def _(p):
    p.scheduler = type(p.scheduler).from_config(p.scheduler.config, set_alpha_to_one=True)
    return ["final alpha"]


@trap("a final alpha that was set by hand")
def _(p):
    p.scheduler.final_alpha_cumprod = torch.tensor(1.0)
    return ["final alpha"]


@trap("no offset")
def _(p):
    p.scheduler = type(p.scheduler).from_config(p.scheduler.config, steps_offset=0)
    return ["timesteps"]


@trap("time embedding in float16", word=PRECISION)
def _(p):
    waves = p.unet.time_proj
    waves.forward = MethodType(lambda self, t: type(self).forward(self, t).half().float(), waves)
    return ["unet"]


# ---- clean changes: of a minisd model, in place --------------------------------------------------------------


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
