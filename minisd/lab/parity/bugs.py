"""Mistakes that people make, to be planted in a copy of a model: what `minisd parity --demo` and the tests find.

Each is a few lines that some implementation got wrong, or could have. It changes one copy, never a class, and returns
the exact names that a comparison has to come up with. In: a `StableDiffusion`. Out: a copy with the mistake in it.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import minisd.layers
import minisd.pipeline
import minisd.text_encoder
import minisd.unet
import minisd.vae
from minisd.lab.parity.verdict import DIFFERENT, PRECISION
from minisd.noise import draw_noise
from minisd.pipeline import StableDiffusion

Plant = Callable[[Any], list[str]]


@dataclass(frozen=True)
class Bug:
    """One mistake. `plant` makes it in place and returns the culprits' names."""

    name: str
    what: str
    plant: Plant
    word: str = DIFFERENT


BUGS: dict[str, Bug] = {}


def bug(name: str, what: str, word: str = DIFFERENT) -> Callable[[Plant], Plant]:
    """Enter a mistake into the list."""

    def enter(plant: Plant) -> Plant:
        BUGS[name] = Bug(name, what, plant, word)
        return plant

    return enter


def planted(sd: StableDiffusion, name: str) -> tuple[StableDiffusion, list[str]]:
    """A copy of `sd` with a mistake, and where it is. Raises ValueError for a name that is not in the list."""
    if name not in BUGS:
        raise ValueError(f"{name!r} is no bug to plant; there are: {', '.join(BUGS)}")
    mutant = copy.copy(sd)
    for part in ("text_encoder", "unet", "vae"):
        setattr(mutant, part, copy.deepcopy(getattr(sd, part)))
    return mutant, BUGS[name].plant(mutant)


# ---- tools -----------------------------------------------------------------------------------------------


def path_of(sd: Any, wanted: nn.Module) -> str:
    """unet.down.0.resnet.norm1, ..."""
    for part in ("unet", "vae", "text_encoder"):
        for path, module in getattr(sd, part).named_modules():
            if module is wanted:
                return f"{part}.{path}".rstrip(".")
    raise ValueError("not a module of this model")


def says(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give one module another `forward`."""
    module.forward = MethodType(forward, module)


@contextmanager
def changed(namespace: Any, name: str, value: Any) -> Iterator[None]:
    """A name in a Python module that means something else for a while."""
    before = getattr(namespace, name)
    setattr(namespace, name, value)
    try:
        yield
    finally:
        setattr(namespace, name, before)


def runs_with(module: nn.Module, namespace: Any, name: str, value: Any) -> None:
    """One module's `forward` runs with another function under that name."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with changed(namespace, name, value):
            return type(self).forward(self, *args, **kwargs)

    says(module, forward)


def attention_at(sd: Any) -> Any:
    """The transformer of the UNet's first block that has one."""
    return next(block.attention for block in (*sd.unet.down, *sd.unet.middle) if block.attention is not None)


def first(modules: Any, kind: type) -> Any:
    return next(module for module in modules if isinstance(module, kind))


def set_number(sd: Any, module: nn.Module, **numbers: Any) -> list[str]:
    """Change attributes of one module; it is the culprit."""
    for name, value in numbers.items():
        assert getattr(module, name) != value, f"{name} is {value} already"
        setattr(module, name, value)
    return [path_of(sd, module)]


def set_schedule(sd: Any, **numbers: Any) -> None:
    sd.config = dataclasses.replace(sd.config, scheduler={**sd.config.scheduler, **numbers})


# ---- epsilons --------------------------------------------------------------------------------------------


@bug("eps-resnet", "GroupNorm of a UNet ResNet block with eps 1e-6 (stable-diffusion.cpp)")
def _(sd: Any) -> list[str]:
    return set_number(sd, sd.unet.down[0].resnet.norm1, eps=1e-6)


@bug("eps-resnet-norm2", "the second GroupNorm of a UNet ResNet block with eps 1e-6")
def _(sd: Any) -> list[str]:
    return set_number(sd, sd.unet.up[-1].resnet.norm2, eps=1e-6)


@bug("eps-transformer", "GroupNorm before a transformer with eps 1e-5 (MLX, tinygrad)")
def _(sd: Any) -> list[str]:
    return set_number(sd, attention_at(sd).norm, eps=1e-5)


@bug("eps-transformer-everywhere", "GroupNorm before every transformer with eps 1e-5")
def _(sd: Any) -> list[str]:
    blocks = (*sd.unet.down, *sd.unet.middle, *sd.unet.up)
    return [name for b in blocks if b.attention is not None for name in set_number(sd, b.attention.norm, eps=1e-5)]


@bug("eps-layernorm", "LayerNorm before cross-attention with eps 1e-6")
def _(sd: Any) -> list[str]:
    return set_number(sd, attention_at(sd).cross_attn_norm, eps=1e-6)


@bug("eps-unet-out", "the UNet's last GroupNorm with eps 1e-6")
def _(sd: Any) -> list[str]:
    return set_number(sd, sd.unet.norm_out, eps=1e-6)


@bug("eps-vae-encoder", "GroupNorm of the VAE's encoder with eps 1e-5 (hkproj, kjsman, tinygrad, MLX)")
def _(sd: Any) -> list[str]:
    return set_number(sd, sd.vae.encoder.down[0].norm1, eps=1e-5)


@bug("eps-vae-decoder", "GroupNorm of the VAE's decoder with eps 1e-5")
def _(sd: Any) -> list[str]:
    return set_number(sd, sd.vae.decoder.up[0].norm2, eps=1e-5)


@bug("eps-vae-attention", "GroupNorm before the VAE's attention with eps 1e-5")
def _(sd: Any) -> list[str]:
    return set_number(sd, sd.vae.decoder.middle[1].norm, eps=1e-5)


@bug("eps-vae-out", "the VAE's last GroupNorm with eps 1e-5")
def _(sd: Any) -> list[str]:
    return set_number(sd, sd.vae.decoder.norm_out, eps=1e-5)


@bug("eps-clip", "LayerNorm of CLIP with eps 1e-6")
def _(sd: Any) -> list[str]:
    return set_number(sd, sd.text_encoder.layers[0].feed_forward_norm, eps=1e-6)


@bug("norm-groups", "GroupNorm with half as many groups")
def _(sd: Any) -> list[str]:
    norm = sd.unet.middle[0].resnet.norm2
    return set_number(sd, norm, num_groups=norm.num_groups // 2)


# ---- attention -------------------------------------------------------------------------------------------


def attend(self: Any, x: Tensor, context: Tensor, **settings: Any) -> Tensor:
    """minisd's attention, open to other settings of the kernel."""
    q, k, v = (
        rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in (self.q(x), self.k(context), self.v(context))
    )
    x = F.scaled_dot_product_attention(q, k, v, **settings)
    return self.out(rearrange(x, "b h n d -> b n (h d)"))


@bug("attention-scale", "attention scaled by the whole width instead of a head's")
def _(sd: Any) -> list[str]:
    attention = attention_at(sd).self_attn

    def forward(self: Any, x: Tensor, context: Tensor, *, causal: bool) -> Tensor:
        return attend(self, x, context, is_causal=causal, scale=self.q.out_features**-0.5)

    says(attention, forward)
    return [path_of(sd, attention)]


@bug("attention-heads", "half as many heads (attention_head_dim read as a size)")
def _(sd: Any) -> list[str]:
    attention = attention_at(sd).cross_attn
    return set_number(sd, attention, heads=attention.heads // 2)


@bug("no-causal-mask", "CLIP without its causal mask")
def _(sd: Any) -> list[str]:
    def forward(self: Any, x: Tensor, context: Tensor, *, causal: bool) -> Tensor:
        return attend(self, x, context)

    for layer in sd.text_encoder.layers:
        says(layer.self_attn, forward)
    return [path_of(sd, layer.self_attn) for layer in sd.text_encoder.layers]


@bug("causal-unet", "a causal mask in the UNet's self-attention")
def _(sd: Any) -> list[str]:
    def forward(self: Any, x: Tensor, context: Tensor, *, causal: bool) -> Tensor:
        return attend(self, x, context, is_causal=True)

    says(attention_at(sd).self_attn, forward)
    return [path_of(sd, attention_at(sd).self_attn)]


@bug("q-k-swapped", "the weights of q and k, of equal shape, swapped")
def _(sd: Any) -> list[str]:
    attention = attention_at(sd).self_attn
    attention.q, attention.k = attention.k, attention.q
    return [path_of(sd, attention.q), path_of(sd, attention.k)]


# ---- activations and feed-forward ------------------------------------------------------------------------


@bug("gelu-tanh", "the tanh approximation of GELU in a feed-forward (candle, tinygrad, stable-diffusion.cpp)")
def _(sd: Any) -> list[str]:
    def forward(self: Any, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.contract(value * F.gelu(gate, approximate="tanh"))

    says(attention_at(sd).feed_forward, forward)
    return [path_of(sd, attention_at(sd).feed_forward)]


@bug("geglu-swapped", "value and gate of GEGLU swapped")
def _(sd: Any) -> list[str]:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.contract(value * F.gelu(gate))

    says(attention_at(sd).feed_forward, forward)
    return [path_of(sd, attention_at(sd).feed_forward)]


@bug("clip-gelu", "the exact GELU in CLIP instead of the quick one")
def _(sd: Any) -> list[str]:
    return [
        name
        for layer in sd.text_encoder.layers
        for name in set_number(sd, layer.feed_forward, activation=minisd.layers.ACTIVATIONS["gelu"])
    ]


@bug("resnet-gelu", "GELU instead of SiLU in a ResNet block")
def _(sd: Any) -> list[str]:
    return set_number(sd, sd.unet.middle[1].resnet, activation=minisd.layers.ACTIVATIONS["gelu"])


@bug("no-last-activation", "no SiLU before the UNet's last convolution")
def _(sd: Any) -> list[str]:
    return set_number(sd, sd.unet, activation=nn.Identity())


# ---- shapes and order ------------------------------------------------------------------------------------


@bug("vae-padding", "the VAE's downsampling padded on all four sides (kjsman)")
def _(sd: Any) -> list[str]:
    down = first(sd.vae.encoder.down, minisd.layers.Downsample)
    return set_number(sd, down.conv, padding=(1, 1), _reversed_padding_repeated_twice=[1, 1, 1, 1])


@bug("vae-padding-left", "the VAE's downsampling padded on the left and the top")
def _(sd: Any) -> list[str]:
    down = first(sd.vae.encoder.down, minisd.layers.Downsample)
    says(down, lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0))))
    return [path_of(sd, down)]


@bug("unet-padding", "the UNet's downsampling padded like the VAE's")
def _(sd: Any) -> list[str]:
    down = next(block.downsample for block in sd.unet.down if block.downsample is not None)
    return set_number(sd, down.conv, padding=(0, 0))


@bug("bilinear", "bilinear enlargement in the place of nearest-neighbour")
def _(sd: Any) -> list[str]:
    up = next(block.upsample for block in sd.unet.up if block.upsample is not None)

    def forward(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="bilinear"))

    says(up, forward)
    return [path_of(sd, up)]


@bug("skip-order", "a skip of the way up that was taken before, where its shape allows it")
def _(sd: Any) -> list[str]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        used: list[Tensor] = []

        def cat(tensors: Any, dim: int = 0) -> Tensor:
            if dim == 1:
                x, skip = tensors
                again = [tensor for tensor in used if tensor.shape == skip.shape]
                tensors = [x, again[0] if again else skip]
                used.append(skip)
            return torch.cat(tensors, dim=dim)

        with changed(minisd.unet, "torch", SimpleNamespace(**{**vars(torch), "cat": cat})):
            return type(self).forward(self, *args, **kwargs)

    says(sd.unet, forward)
    return ["unet"]


@bug("skip-first", "skips put before what they are joined to")
def _(sd: Any) -> list[str]:
    def cat(tensors: Any, dim: int = 0) -> Tensor:
        return torch.cat(list(tensors)[::-1] if dim == 1 else tensors, dim=dim)

    runs_with(sd.unet, minisd.unet, "torch", SimpleNamespace(**{**vars(torch), "cat": cat}))
    return ["unet"]


@bug("residual-scale", "a residual block whose output is 1.0001 times what it should be")
def _(sd: Any) -> list[str]:
    block = sd.unet.up[0].resnet
    says(block, lambda self, x, time=None: type(self).forward(self, x, time) * 1.0001)
    return [path_of(sd, block)]


@bug("no-residual", "a transformer that forgets its residual")
def _(sd: Any) -> list[str]:
    attention = attention_at(sd)
    says(attention, lambda self, x, context: type(self).forward(self, x, context) - x)
    return [path_of(sd, attention)]


@bug("no-time", "a ResNet block that is not told the time")
def _(sd: Any) -> list[str]:
    block = sd.unet.middle[0].resnet
    says(block, lambda self, x, time=None: type(self).forward(self, x, None))
    return [path_of(sd, block)]


# ---- the time embedding ----------------------------------------------------------------------------------

WAVES = minisd.unet.timestep_embedding


@bug("sin-cos", "sines before cosines in the time embedding")
def _(sd: Any) -> list[str]:
    def waves(timesteps: Tensor, width: int) -> Tensor:
        cosines, sines = WAVES(timesteps, width).chunk(2, dim=-1)
        return torch.cat([sines, cosines], dim=-1)

    runs_with(sd.unet, minisd.unet, "timestep_embedding", waves)
    return ["unet"]


@bug("frequency-shift", "frequencies of the time embedding that end one step too far (freq_shift 1)")
def _(sd: Any) -> list[str]:
    def waves(timesteps: Tensor, width: int) -> Tensor:
        half = width // 2
        powers = torch.arange(half, dtype=torch.float32) / (half - 1)
        angles = timesteps[:, None].float() * torch.exp(-9.210340371976184 * powers)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    runs_with(sd.unet, minisd.unet, "timestep_embedding", waves)
    return ["unet"]


@bug("time-dtype", "the time embedding computed in float16", word=PRECISION)
def _(sd: Any) -> list[str]:
    def waves(timesteps: Tensor, width: int) -> Tensor:
        half = width // 2
        powers = torch.arange(half, dtype=torch.float16) / half
        angles = timesteps[:, None].half() * torch.exp(-9.210340371976184 * powers)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    runs_with(sd.unet, minisd.unet, "timestep_embedding", waves)
    return ["unet"]


# ---- weights ---------------------------------------------------------------------------------------------


@bug("one-weight", "one weight of one matrix off by a millionth")
def _(sd: Any) -> list[str]:
    matrix = sd.unet.middle[0].attention.cross_attn.v
    with torch.no_grad():
        matrix.weight[0, 0] += 1e-6
    return [path_of(sd, matrix)]


@bug("unused-weight", "one weight off that the case does not reach: a token that is not in the prompt")
def _(sd: Any) -> list[str]:
    with torch.no_grad():
        sd.text_encoder.token_embedding.weight[7, 0] += 1e-6
    return ["text_encoder.token_embedding"]


@bug("bias-lost", "a bias that was not loaded")
def _(sd: Any) -> list[str]:
    with torch.no_grad():
        sd.vae.decoder.conv_in.bias.zero_()
    return ["vae.decoder.conv_in"]


@bug("transposed", "a square matrix loaded transposed")
def _(sd: Any) -> list[str]:
    matrix = sd.vae.encoder.middle[1].attn.v
    with torch.no_grad():
        matrix.weight.copy_(matrix.weight.T.clone())
    return [path_of(sd, matrix)]


# ---- CLIP ------------------------------------------------------------------------------------------------


@bug("no-final-norm", "CLIP without its final LayerNorm")
def _(sd: Any) -> list[str]:
    sd.text_encoder.final_norm = nn.Identity()
    return ["text_encoder.final_norm"]


@bug("positions", "CLIP's positions counted from 1")
def _(sd: Any) -> list[str]:
    def arange(end: int, **settings: Any) -> Tensor:
        return (torch.arange(end, **settings) + 1).clamp(max=end - 1)

    lookalike = SimpleNamespace(**{**vars(torch), "arange": arange})
    runs_with(sd.text_encoder, minisd.text_encoder, "torch", lookalike)
    return ["text_encoder"]


@bug("clip-skip", "the second last layer of CLIP in the place of the last")
def _(sd: Any) -> list[str]:
    says(sd.text_encoder, lambda self, ids, *, clip_skip=0: type(self).forward(self, ids, clip_skip=1))
    return ["text_encoder"]


@bug("padding-token", "prompts filled up with token 0")
def _(sd: Any) -> list[str]:
    right = sd.tokenizer

    def tokenizer(texts: list[str]) -> Tensor:
        ids = right(texts)
        padding = (ids == ids[:, -1:]).cumsum(dim=1) > 1
        return ids.masked_fill(padding, 0)

    sd.tokenizer = tokenizer
    return ["tokens"]


# ---- the VAE ---------------------------------------------------------------------------------------------


@bug("logvar", "the log variance of the VAE not clamped")
def _(sd: Any) -> list[str]:
    def encode(self: Any, images: Tensor) -> Any:
        gaussian = type(self).encode(self, images)
        gaussian.logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)[1]
        return gaussian

    sd.vae.encode = MethodType(encode, sd.vae)
    return ["VAE moments"]


@bug("scaling-factor", "latents scaled by another factor on their way to the VAE")
def _(sd: Any) -> list[str]:
    config = dataclasses.replace(sd.vae.config, scaling_factor=sd.vae.config.scaling_factor * 1.0001)
    sd.vae.config = config
    return ["VAE input"]


@bug("pixels-truncated", "bytes cut instead of rounded (CompVis, kjsman, hkproj)")
def _(sd: Any) -> list[str]:
    right = minisd.pipeline.to_pictures
    sd.to_pictures = lambda images: right(((images / 2 + 0.5).clamp(0, 1) * 255).floor() / 127.5 - 1)
    return ["pixels"]


# ---- the loop and the schedule ---------------------------------------------------------------------------


def guided(combine: Callable[[Tensor, Tensor, float], Tensor]) -> Plant:
    """Another formula of guidance."""

    def predict_noise(self: Any, x: Tensor, t: Tensor, context: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
        negative, positive = self.unet(torch.cat([x, x]), t, context).chunk(2)
        return combine(negative, positive, scale)

    def plant(sd: Any) -> list[str]:
        sd.predict_noise = MethodType(predict_noise, sd)
        return ["guidance"]

    return plant


bug("guidance-order", "the two halves of guidance swapped")(
    guided(lambda negative, positive, scale: positive + scale * (negative - positive))
)
bug("guidance-formula", "guidance counted from the prompt's own prediction")(
    guided(lambda negative, positive, scale: positive + scale * (positive - negative))
)


@bug("final-alpha", "a last step that ends at alpha 1 (tinygrad)")
def _(sd: Any) -> list[str]:
    set_schedule(sd, set_alpha_to_one=True)
    return ["final alpha"]


@bug("steps-offset", "timesteps without the offset of 1")
def _(sd: Any) -> list[str]:
    set_schedule(sd, steps_offset=0)
    return ["timesteps"]


@bug("spacing", "timesteps that end instead of begin at a multiple (trailing)")
def _(sd: Any) -> list[str]:
    set_schedule(sd, timestep_spacing="trailing")
    return ["timesteps"]


@bug("betas", "another curve of betas")
def _(sd: Any) -> list[str]:
    set_schedule(sd, beta_schedule="linear")
    return ["alphas"]


@bug("beta-end", "betas that end at 0.0121")
def _(sd: Any) -> list[str]:
    set_schedule(sd, beta_end=0.0121)
    return ["alphas"]


@bug("clip-sample", "x0 clipped to [-1, 1], as for pixels")
def _(sd: Any) -> list[str]:
    set_schedule(sd, clip_sample=True)
    return ["latents"]


@bug("v-prediction", "noise taken for velocity")
def _(sd: Any) -> list[str]:
    set_schedule(sd, prediction_type="v_prediction")
    return ["latents"]


@bug("noise-order", "the initial noise drawn in another order of axes")
def _(sd: Any) -> list[str]:
    def initial_noise(self: Any, shape: tuple[int, ...], generator: Any, latents: Tensor | None) -> Tensor:
        if latents is not None:
            return type(self).initial_noise(self, shape, generator, latents)
        size = torch.Size((shape[0], shape[2], shape[3], shape[1]))
        return draw_noise(size, generator, self.device, self.dtype).permute(0, 3, 1, 2)

    sd.initial_noise = MethodType(initial_noise, sd)
    return ["initial noise"]


@bug("context-swapped", "the prompts of a batch in the wrong order")
def _(sd: Any) -> list[str]:
    def encode_prompt(self: Any, prompts: Any, negatives: Any, *rest: Any) -> Tensor:
        return type(self).encode_prompt(self, prompts[::-1], negatives, *rest)

    sd.encode_prompt = MethodType(encode_prompt, sd)
    return ["UNet context"]
