"""Mistakes that people make, to be planted in a copy of a model: what `minisd parity --demo` and the tests find.

Each is a row of one table: a few lines that some implementation got wrong, or could have. It changes one copy, never a
class, and returns the exact names that a comparison has to come up with. In: a side. Out: a copy with the mistake.
Modules are found by minisd's names, so that rows which change a number or a weight work in diffusers' code too.
"""

import copy
import dataclasses
import functools
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import minisd.layers
import minisd.pipeline
import minisd.schedulers.ddpm
import minisd.text_encoder
import minisd.unet
from minisd.checkpoint.hub import embedded_model
from minisd.lab.parity.compare import Progress, compare
from minisd.lab.parity.judge import Observer
from minisd.lab.parity.opening import open_side
from minisd.lab.parity.sides import MinisdSide, PipelineSide, minisd_side
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, Verdict
from minisd.noise import draw_noise
from minisd.schedulers import equations

Plant = Callable[[PipelineSide], list[str]]


@dataclass(frozen=True)
class Bug:
    """One mistake. `plant` makes it in a copy and returns the culprits' names."""

    name: str
    what: str
    plant: Plant
    probe: str = ""  # what the parity tests look at to notice it: "unet", "vae", "text", "ddim", ...; "": not theirs
    word: str = DIFFERENT
    lab: bool = True  # is it to be found by a comparison of two whole models in the lab?


def planted(side: PipelineSide, name: str, plant: Plant | None = None) -> tuple[PipelineSide, list[str]]:
    """A copy of a side with a mistake, and where it is; `plant`: another way to make it than the table's.

    Raises ValueError for a name that is not in the table.
    """
    if name not in BUGS and name not in OTHERS:
        raise ValueError(f"{name!r} is no bug to plant; there are: {', '.join(BUGS)}")
    mutant = copied_side(side, f"a copy with the bug {name!r}")
    return mutant, (plant or (BUGS.get(name) or OTHERS[name]).plant)(mutant)


def copied_side(side: PipelineSide, name: str) -> PipelineSide:
    """A side with networks and a scheduler of its own."""
    model = copy.copy(side.model)
    for part in ("text_encoder", "unet", "vae", "scheduler"):
        if part in vars(model):
            vars(model)[part] = copy.deepcopy(vars(model)[part])
    return type(side)(name, model, side.config)


def demonstrate(
    bug: str, a: str | None, case: Mapping[str, Any], progress: Progress, observe: Observer | None = None
) -> Verdict:
    """Compare A (by default the embedded model) with a copy of it in minisd that has a bug.

    Raises ValueError for a bug or a side that there is not.
    """
    reference = open_side(a or f"minisd:{embedded_model()}")
    kind, _, path = (a or "").partition(":")
    if not isinstance(reference, MinisdSide) and kind != "diffusers":
        raise ValueError(f"{a}: a bug can be planted in a copy of minisd:PATH or diffusers:PATH only")
    mutant, _ = planted(reference if isinstance(reference, MinisdSide) else minisd_side(path), bug)
    verdict = compare(reference, mutant, case, progress=progress, observe=observe)
    verdict.command = shlex.join(["minisd", "parity", *([a] if a else []), "--demo", bug])
    return verdict


# ---- how to plant: in any implementation ----------------------------------------------------------------

ALL = slice(None)  # every module that a pattern fits; FIRST and LAST: one of them
FIRST, LAST = slice(1), slice(-1, None)


def modules(side: PipelineSide, pattern: str, which: slice = FIRST) -> list[tuple[str, Any]]:
    """(name, module) of those whose names fit "unet.*.attention.norm", in the order of the network."""
    component = pattern.partition(".")[0]
    network = side.networks[component]
    named = (
        (f"{component}.{network.canonical.get(path, '?')}".rstrip("."), m) for path, m in network.root.named_modules()
    )
    found = [(name, module) for name, module in named if fnmatchcase(name, pattern)]
    assert found, f"no module is called {pattern}"
    return found[which]


def change(pattern: str, alter: Callable[[Any], Any], which: slice = FIRST) -> Plant:
    """Alter modules; they are the culprits."""

    @torch.no_grad()
    def plant(side: PipelineSide) -> list[str]:
        found = modules(side, pattern, which)
        for _, module in found:
            alter(module)
        return [name for name, _ in found]

    return plant


def number(pattern: str, which: slice = FIRST, **numbers: Any) -> Plant:
    """Set attributes of modules; a function is given the right value."""

    def alter(module: Any) -> None:
        for name, value in numbers.items():
            before = getattr(module, name)
            after = value(before) if callable(value) else value
            assert before != after, f"{name} is {after} already"
            setattr(module, name, after)

    return change(pattern, alter, which)


def half(value: int) -> int:
    return value // 2


def swapped(one: str, other: str) -> Plant:
    """The weights of two modules exchanged."""

    def plant(side: PipelineSide) -> list[str]:
        (a_name, a), (b_name, b) = modules(side, one)[0], modules(side, other)[0]
        a.weight.data, b.weight.data = b.weight.data, a.weight.data
        return [a_name, b_name]

    return plant


def schedule(culprit: str, **numbers: Any) -> Plant:
    """Another setting of the scheduler."""

    def plant(side: PipelineSide) -> list[str]:
        model = side.model
        if isinstance(side, MinisdSide):
            model.scheduler_config = {**model.scheduler_config, **numbers}
        else:
            model.scheduler = type(model.scheduler).from_config(model.scheduler.config, **numbers)
        return [culprit]

    return plant


def scaling_factor(side: PipelineSide) -> list[str]:
    vae = side.model.vae
    factor = vae.config.scaling_factor * 1.0001
    if isinstance(side, MinisdSide):
        vae.config = dataclasses.replace(vae.config, scaling_factor=factor)
    else:
        vae.register_to_config(scaling_factor=factor)
    return ["VAE input"]


def final_alpha_by_hand(side: PipelineSide) -> list[str]:
    side.model.scheduler.final_alpha_cumprod = torch.tensor(1.0)
    return ["final alpha"]


# ---- how to plant: in minisd's code ---------------------------------------------------------------------


def forward(pattern: str, function: Callable[..., Any], which: slice = FIRST) -> Plant:
    """Give modules another `forward`."""
    return change(pattern, lambda module: setattr(module, "forward", MethodType(function, module)), which)


def right(module: Any, *args: Any, **kwargs: Any) -> Any:
    """What a module's class computes."""
    return type(module).forward(module, *args, **kwargs)


@contextmanager
def changed(namespace: Any, name: str, value: Any) -> Iterator[None]:
    """A name in a Python module that means something else for a while."""
    before = getattr(namespace, name)
    setattr(namespace, name, value)
    try:
        yield
    finally:
        setattr(namespace, name, before)


def runs_with(pattern: str, namespace: Any, name: str, value: Any) -> Plant:
    """One module's `forward` runs with another function under that name."""

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with changed(namespace, name, value):
            return right(self, *args, **kwargs)

    return forward(pattern, run)


def torch_with(**functions: Any) -> Any:
    """torch, but for some functions."""
    return SimpleNamespace(**{**vars(torch), **functions})


def method(culprit: str, name: str, function: Callable[..., Any], part: str = "") -> Plant:
    """Give the model, or a part of it, another method."""

    def plant(side: PipelineSide) -> list[str]:
        owner = getattr(side.model, part) if part else side.model
        setattr(owner, name, MethodType(function, owner))
        return [culprit]

    return plant


def scheduler(alter: Callable[[Any], None]) -> Plant:
    """Alter every scheduler that the model makes."""

    def make_scheduler(self: Any, *settings: Any) -> Any:
        made = type(self).make_scheduler(self, *settings)
        alter(made)
        return made

    return method("", "make_scheduler", make_scheduler)


# ---- the mistakes' own code ------------------------------------------------------------------------------


def attend(self: Any, x: Tensor, context: Tensor, **settings: Any) -> Tensor:
    """minisd's attention, open to other settings of the kernel."""
    q, k, v = (
        rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in (self.q(x), self.k(context), self.v(context))
    )
    x = F.scaled_dot_product_attention(q, k, v, **settings)
    return self.out(rearrange(x, "b h n d -> b n (h d)"))


def scaled_by_width(self: Any, x: Tensor, context: Tensor, *, causal: bool) -> Tensor:
    return attend(self, x, context, is_causal=causal, scale=self.q.out_features**-0.5)


def never_causal(self: Any, x: Tensor, context: Tensor, *, causal: bool) -> Tensor:
    return attend(self, x, context)


def always_causal(self: Any, x: Tensor, context: Tensor, *, causal: bool) -> Tensor:
    return attend(self, x, context, is_causal=True)


def gated(combine: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """GEGLU with another formula."""
    return lambda self, x: self.contract(combine(*self.expand(x).chunk(2, dim=-1)))


def pad_all_sides(conv: Any) -> None:
    conv.padding, conv._reversed_padding_repeated_twice = (1, 1), [1, 1, 1, 1]


def padded_left(side: PipelineSide) -> list[str]:
    conv, _ = modules(side, "vae.encoder.down.*.conv")[0]
    return forward(conv.removesuffix(".conv"), lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0))))(side)


def bilinear(self: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    return self.conv(F.interpolate(x, size=size, mode="bilinear"))


def skip_taken_before(self: Any, *args: Any, **kwargs: Any) -> Any:
    used: list[Tensor] = []

    def cat(tensors: Any, dim: int = 0) -> Tensor:
        if dim == 1:
            x, skip = tensors
            again = [tensor for tensor in used if tensor.shape == skip.shape]
            tensors = [x, again[0] if again else skip]
            used.append(skip)
        return torch.cat(tensors, dim=dim)

    with changed(minisd.unet, "torch", torch_with(cat=cat)):
        return right(self, *args, **kwargs)


def cat_reversed(tensors: Any, dim: int = 0) -> Tensor:
    return torch.cat(list(tensors)[::-1] if dim == 1 else tensors, dim=dim)


EMBEDDING = minisd.unet.timestep_embedding


def sines_first(timesteps: Tensor, width: int) -> Tensor:
    cosines, sines = EMBEDDING(timesteps, width).chunk(2, dim=-1)
    return torch.cat([sines, cosines], dim=-1)


def embedding(dtype: torch.dtype, shift: int) -> Callable[[Tensor, int], Tensor]:
    """The sinusoidal timestep embedding in a dtype, its frequencies shifted."""

    def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
        powers = torch.arange(width // 2, dtype=dtype) / (width // 2 - shift)
        angles = timesteps[:, None].to(dtype) * torch.exp(-9.210340371976184 * powers)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    return timestep_embedding


def positions_from_1(end: int, **settings: Any) -> Tensor:
    return (torch.arange(end, **settings) + 1).clamp(max=end - 1)


def second_last_layer(self: Any, ids: Tensor, *, clip_skip: int = 0) -> Tensor:
    return right(self, ids, clip_skip=1)


def no_final_norm(side: PipelineSide) -> list[str]:
    side.model.text_encoder.final_norm = nn.Identity()
    return ["text_encoder.final_norm"]


def padding_token(side: PipelineSide) -> list[str]:
    tokenizer = side.model.tokenizer

    def padded_with_0(texts: list[str]) -> Tensor:
        ids = tokenizer(texts)
        return ids.masked_fill((ids == ids[:, -1:]).cumsum(dim=1) > 1, 0)

    side.model.tokenizer = padded_with_0
    return ["tokens"]


def logvar_not_clamped(self: Any, images: Tensor) -> Any:
    gaussian = type(self).encode(self, images)
    gaussian.logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)[1]
    return gaussian


def pixels_truncated(side: PipelineSide) -> list[str]:
    rounded = minisd.pipeline.to_pictures
    side.model.to_pictures = lambda images: rounded(((images / 2 + 0.5).clamp(0, 1) * 255).floor() / 127.5 - 1)
    return ["pixels"]


def guidance(combine: Callable[[Tensor, Tensor, float], Tensor]) -> Plant:
    """Another formula of classifier-free guidance."""

    def predict_noise(self: Any, x: Tensor, t: Tensor, context: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
        negative, positive = self.unet(torch.cat([x, x]), t, context).chunk(2)
        eps = combine(negative, positive, scale)
        return minisd.pipeline.rescale_guidance(eps, positive, rescale) if rescale > 0 else eps

    return method("guidance", "predict_noise", predict_noise)


def rescaled_by_channel(eps: Tensor, positive: Tensor, amount: float) -> Tensor:
    spread = positive.std((2, 3), keepdim=True) / eps.std((2, 3), keepdim=True)
    return amount * eps * spread + (1 - amount) * eps


def guidance_by_channel(self: Any, *args: Any) -> Tensor:
    with changed(minisd.pipeline, "rescale_guidance", rescaled_by_channel):
        return type(self).predict_noise(self, *args)


def channels_drawn_last(self: Any, shape: tuple[int, ...], generator: Any, latents: Tensor | None) -> Tensor:
    if latents is not None:
        return type(self).initial_noise(self, shape, generator, latents)
    size = torch.Size((shape[0], shape[2], shape[3], shape[1]))
    return draw_noise(size, generator, self.device, self.dtype).permute(0, 3, 1, 2)


def prompts_reversed(self: Any, prompts: Any, negatives: Any, *rest: Any) -> Tensor:
    return type(self).encode_prompt(self, prompts[::-1], negatives, *rest)


def interleaved(self: Any, prompts: Any, negatives: Any, images_per_prompt: int = 1, *rest: Any) -> Tensor:
    halves = type(self).encode_prompt(self, prompts, negatives, 1, *rest).chunk(1 if negatives is None else 2)
    return torch.cat([half.repeat(images_per_prompt, 1, 1) for half in halves])


def betas_in_float64(made: Any) -> None:
    """CompVis computes the schedule in float64 and rounds it once."""
    table = {**equations.BETA_SCHEDULES, "scaled_linear": scaled_linear_in_float64}
    with changed(equations, "BETA_SCHEDULES", table):
        vars(made).update(vars(type(made).from_config(made.config)))


def scaled_linear_in_float64(start: float, end: float, steps: int) -> Tensor:
    return (torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2).float()


def ends_as_ddim(made: Any) -> None:
    """DDPM's last step ends at alpha 1, DDIM's (in SD 1.5) at alphas_cumprod[0]."""
    alpha_bar = made.alpha_bar
    made.alpha_bar = lambda t: made.alphas_cumprod[0] if t < 0 else alpha_bar(t)


def no_noise_at_the_end(made: Any) -> None:
    """SD 1.5 ends at t=1, which still gets noise; only t=0 gets none.

    It is too little to see (the variance is clamped at 1e-20), but the generator's state is another afterwards.
    """
    step = made.step

    @functools.wraps(step)
    def silent_at_the_end(noise: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        if int(timestep) != int(made.timesteps[-1]):
            return step(noise, timestep, *args, **kwargs)
        with changed(minisd.schedulers.ddpm, "draw_noise", lambda shape, *_: torch.zeros(shape)):
            return step(noise, timestep, *args, **kwargs)

    made.step = silent_at_the_end


# ---- the table -------------------------------------------------------------------------------------------

GELU = minisd.layers.ACTIVATIONS["gelu"]
TRANSFORMER = "unet.*.attention"  # the first of them

TABLE = (
    # Epsilons and groups of norms.
    Bug("eps-resnet", "GroupNorm of a UNet ResNet block with eps 1e-6 (stable-diffusion.cpp)",
        number("unet.down.0.resnet.norm1", eps=1e-6), "unet"),
    Bug("eps-resnet-norm2", "the second GroupNorm of a UNet ResNet block with eps 1e-6",
        number("unet.up.*.resnet.norm2", LAST, eps=1e-6)),
    Bug("eps-transformer", "GroupNorm before a transformer with eps 1e-5 (MLX, tinygrad)",
        number(f"{TRANSFORMER}.norm", eps=1e-5), "unet"),
    Bug("eps-transformer-everywhere", "GroupNorm before every transformer with eps 1e-5",
        number(f"{TRANSFORMER}.norm", ALL, eps=1e-5)),
    Bug("eps-layernorm", "LayerNorm before cross-attention with eps 1e-6",
        number(f"{TRANSFORMER}.cross_attn_norm", eps=1e-6), "unet"),
    Bug("eps-unet-out", "the UNet's last GroupNorm with eps 1e-6", number("unet.norm_out", eps=1e-6)),
    Bug("eps-vae-encoder", "GroupNorm of the VAE's encoder with eps 1e-5 (hkproj, kjsman, tinygrad, MLX)",
        number("vae.encoder.down.0.norm1", eps=1e-5), "vae"),
    Bug("eps-vae-decoder", "GroupNorm of the VAE's decoder with eps 1e-5", number("vae.decoder.up.0.norm2", eps=1e-5)),
    Bug("eps-vae-attention", "GroupNorm before the VAE's attention with eps 1e-5",
        number("vae.decoder.middle.1.norm", eps=1e-5)),
    Bug("eps-vae-out", "the VAE's last GroupNorm with eps 1e-5", number("vae.decoder.norm_out", eps=1e-5)),
    Bug("eps-clip", "LayerNorm of CLIP with eps 1e-6",
        number("text_encoder.layers.0.feed_forward_norm", eps=1e-6), "text"),
    Bug("norm-groups", "GroupNorm with half as many groups",
        number("unet.middle.0.resnet.norm2", num_groups=half), "unet"),
    # Attention.
    Bug("attention-scale", "attention scaled by the whole width instead of a head's",
        forward(f"{TRANSFORMER}.self_attn", scaled_by_width)),
    Bug("attention-heads", "half as many heads (attention_head_dim read as a size)",
        number(f"{TRANSFORMER}.cross_attn", heads=half), "unet"),
    Bug("clip-heads", "half as many heads in CLIP",
        number("text_encoder.layers.0.self_attn", heads=half), "text", lab=False),
    Bug("no-causal-mask", "CLIP without its causal mask",
        forward("text_encoder.layers.*.self_attn", never_causal, ALL), "text"),
    Bug("causal-unet", "a causal mask in the UNet's self-attention",
        forward(f"{TRANSFORMER}.self_attn", always_causal)),
    Bug("q-k-swapped", "the weights of q and k, of equal shape, swapped",
        swapped(f"{TRANSFORMER}.self_attn.q", f"{TRANSFORMER}.self_attn.k"), "unet"),
    # Activations and feed-forward networks.
    Bug("gelu-tanh", "the tanh approximation of GELU in a feed-forward (candle, tinygrad, stable-diffusion.cpp)",
        forward(f"{TRANSFORMER}.feed_forward", gated(lambda value, gate: value * F.gelu(gate, approximate="tanh"))),
        "unet"),
    Bug("geglu-swapped", "value and gate of GEGLU swapped",
        forward(f"{TRANSFORMER}.feed_forward", gated(lambda gate, value: value * F.gelu(gate))), "unet"),
    Bug("clip-gelu", "the exact GELU in CLIP instead of the quick one",
        number("text_encoder.layers.*.feed_forward", ALL, activation=lambda _: GELU), "text"),
    Bug("resnet-gelu", "GELU instead of SiLU in a ResNet block",
        number("unet.middle.1.resnet", activation=lambda _: GELU)),
    Bug("no-last-activation", "no SiLU before the UNet's last convolution",
        number("unet", activation=lambda _: nn.Identity())),
    # Shapes and order.
    Bug("vae-padding", "the VAE's downsampling padded on all four sides (kjsman)",
        change("vae.encoder.down.*.conv", pad_all_sides), "vae"),
    Bug("vae-padding-left", "the VAE's downsampling padded on the left and the top",
        padded_left),
    Bug("unet-padding", "the UNet's downsampling padded like the VAE's",
        number("unet.*.downsample.conv", padding=(0, 0))),
    Bug("bilinear", "bilinear enlargement in the place of nearest-neighbour", forward("unet.*.upsample", bilinear)),
    Bug("skip-order", "a skip connection that was used before, where its shape allows it",
        forward("unet", skip_taken_before), "unet"),
    Bug("skip-first", "skip connections concatenated before the feature maps instead of behind them",
        runs_with("unet", minisd.unet, "torch", torch_with(cat=cat_reversed))),
    Bug("residual-scale", "a residual block whose output is 1.0001 times what it should be",
        forward("unet.up.0.resnet", lambda self, x, time=None: right(self, x, time) * 1.0001), "unet"),
    Bug("no-residual", "a transformer without its residual connection",
        forward(TRANSFORMER, lambda self, x, context: right(self, x, context) - x)),
    Bug("no-time", "a ResNet block without timestep conditioning",
        forward("unet.middle.0.resnet", lambda self, x, time=None: right(self, x, None))),
    # The timestep embedding.
    Bug("sin-cos", "sines before cosines in the time embedding",
        runs_with("unet", minisd.unet, "timestep_embedding", sines_first), "unet"),
    Bug("frequency-shift", "frequencies of the time embedding that end one step too far (freq_shift 1)",
        runs_with("unet", minisd.unet, "timestep_embedding", embedding(torch.float32, 1)), "unet"),
    Bug("time-dtype", "the time embedding computed in float16",
        runs_with("unet", minisd.unet, "timestep_embedding", embedding(torch.float16, 0)), word=PRECISION),
    # Weights.
    Bug("one-weight", "one weight of one matrix off by a millionth",
        change("unet.middle.0.attention.cross_attn.v", lambda module: module.weight[0, 0].add_(1e-6)), "unet"),
    Bug("unused-weight", "one weight off that the case does not reach: a token that is not in the prompt",
        change("text_encoder.token_embedding", lambda module: module.weight[7, 0].add_(1e-6))),
    Bug("bias-lost", "a bias that was not loaded", change("vae.decoder.conv_in", lambda module: module.bias.zero_())),
    Bug("transposed", "a square matrix loaded transposed",
        change("vae.encoder.middle.1.attn.v", lambda module: module.weight.copy_(module.weight.T.clone()))),
    # CLIP.
    Bug("no-final-norm", "CLIP without its final LayerNorm", no_final_norm, "text"),
    Bug("positions", "CLIP's positions counted from 1",
        runs_with("text_encoder", minisd.text_encoder, "torch", torch_with(arange=positions_from_1))),
    Bug("clip-skip", "the second last layer of CLIP in the place of the last",
        forward("text_encoder", second_last_layer)),
    Bug("padding-token", "prompts padded with token 0", padding_token),
    # The VAE.
    Bug("logvar", "the log variance of the VAE not clamped",
        method("VAE moments", "encode", logvar_not_clamped, "vae"), "logvar"),
    Bug("scaling-factor", "latents scaled by another factor before the VAE", scaling_factor, "ddim"),
    Bug("pixels-truncated", "bytes cut instead of rounded (CompVis, kjsman, hkproj)", pixels_truncated, "ddim"),
    # The loop and the schedule.
    Bug("guidance-order", "the two halves of guidance swapped",
        guidance(lambda negative, positive, scale: positive + scale * (negative - positive)), "ddim"),
    Bug("guidance-formula", "guidance counted from the prompt's own prediction",
        guidance(lambda negative, positive, scale: positive + scale * (positive - negative))),
    Bug("guidance-rescale", "guidance rescaled channel by channel",
        method("guidance", "predict_noise", guidance_by_channel), "ddim", lab=False),
    Bug("final-alpha", "a last step that ends at alpha 1 (tinygrad)",
        schedule("final alpha", set_alpha_to_one=True), "ddim"),
    Bug("final-alpha-by-hand", "a scheduler whose final alpha was set by hand", final_alpha_by_hand, lab=False),
    Bug("steps-offset", "timesteps without the offset of 1", schedule("timesteps", steps_offset=0), "ddim"),
    Bug("spacing", "timesteps that end instead of begin at a multiple (trailing)",
        schedule("timesteps", timestep_spacing="trailing"), "ddim"),
    Bug("betas", "another curve of betas", schedule("alphas", beta_schedule="linear"), "ddim"),
    Bug("beta-end", "betas that end at 0.0121", schedule("alphas", beta_end=0.0121), "ddim"),
    Bug("betas-float64", "betas computed in float64 and rounded once (CompVis)",
        scheduler(betas_in_float64), "betas", lab=False),
    Bug("clip-sample", "x0 clipped to [-1, 1], as for pixels", schedule("latents", clip_sample=True), "ddim"),
    Bug("v-prediction", "noise prediction taken for velocity", schedule("latents", prediction_type="v_prediction")),
    Bug("ddpm-final-alpha", "DDPM's last step ending where DDIM's does", scheduler(ends_as_ddim), "ddpm", lab=False),
    Bug("ddpm-last-noise", "DDPM without noise at its last step", scheduler(no_noise_at_the_end), "ddpm", lab=False),
    Bug("noise-order", "the initial noise drawn in another order of axes",
        method("initial noise", "initial_noise", channels_drawn_last)),
    Bug("context-swapped", "the prompts of a batch in the wrong order",
        method("UNet context", "encode_prompt", prompts_reversed)),
    Bug("interleaved", "images of a prompt in the order a, b, a, b instead of a, a, b, b",
        method("UNet context", "encode_prompt", interleaved), "ddim", lab=False),
)  # fmt: skip

BUGS = {bug.name: bug for bug in TABLE if bug.lab}
OTHERS = {bug.name: bug for bug in TABLE if not bug.lab}  # of the tests only: the lab compares no DDPM and no rescaling
