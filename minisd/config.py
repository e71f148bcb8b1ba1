"""Every number of the architecture that varies, in one place.

The models take these dataclasses and nothing else. No field has a default, here or in the layers: a number that is
not passed cannot be passed wrongly (every from-scratch port that we read has a wrong GroupNorm epsilon that a default
argument supplied). `SD15` is Stable Diffusion 1.5. Next in the walk: `checkpoint/keymap.py`.
"""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from minisd.files import shown


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The text half of CLIP (Radford et al. 2021, arXiv:2103.00020)."""

    vocabulary: int  # how many tokens have an embedding
    context_length: int  # how many tokens a prompt has, start, end and padding included
    width: int
    layers: int
    heads: int
    hidden_width: int  # inside the feed-forward network
    activation: str  # "quick_gelu" in OpenAI's CLIP
    layer_norm_eps: float


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The denoiser (Rombach et al. 2022, arXiv:2112.10752). Tuples go from the highest resolution to the lowest."""

    sample_size: int  # default height and width of the latents: a pixel size of 8 times that
    in_channels: int  # 4 latent channels; 9 in inpainting models (latents, mask, masked image)
    out_channels: int
    widths: tuple[int, ...]  # channels at each resolution
    attention: tuple[bool, ...]  # does this resolution have transformers?
    resnets_per_level: int  # on the way down; one more on the way up
    heads: int  # diffusers calls it attention_head_dim, and means the number of heads
    context_width: int  # the width of the text encoder
    activation: str
    downsample_padding: int
    norm_groups: int
    norm_eps: float  # GroupNorm in ResNet blocks and before the last convolution
    transformer_norm_eps: float  # GroupNorm at the entry of a transformer: not the same number!
    layer_norm_eps: float  # LayerNorm inside a transformer

    @property
    def time_width(self) -> int:
        """The width of the embedded timestep."""
        return 4 * self.widths[0]

    @property
    def skip_widths(self) -> list[int]:
        """The widths of the skips that the way down leaves for the way up, first pushed first: 12 of them."""
        widths = [self.widths[0]]
        for level, width in enumerate(self.widths):
            downsamples = level < len(self.widths) - 1
            widths += [width] * (self.resnets_per_level + downsamples)
        return widths


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The autoencoder (Kingma & Welling 2013; the "KL-f8" of Rombach et al. 2022)."""

    sample_size: int  # height and width of the pictures it was trained on, in pixels
    image_channels: int
    latent_channels: int
    widths: tuple[int, ...]
    resnets_per_level: int  # in the encoder; one more in the decoder
    activation: str
    downsample_padding: int  # 0: one row and column of zeros at the bottom and right instead
    norm_groups: int
    norm_eps: float
    scaling_factor: float  # latents are multiplied by it before diffusion, so that their variance is about 1

    @property
    def downsampling(self) -> int:
        """How many pixels of height and width one latent stands for: 8."""
        return 1 << (len(self.widths) - 1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole Stable Diffusion model; `scheduler` holds diffusers' constructor arguments for its noise schedule."""

    text_encoder: TextEncoderConfig
    unet: UNetConfig
    vae: VAEConfig
    scheduler: Mapping[str, object]


SD15 = ModelConfig(
    text_encoder=TextEncoderConfig(
        vocabulary=49408,
        context_length=77,
        width=768,
        layers=12,
        heads=12,
        hidden_width=3072,
        activation="quick_gelu",
        layer_norm_eps=1e-5,
    ),
    unet=UNetConfig(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        widths=(320, 640, 1280, 1280),
        attention=(True, True, True, False),
        resnets_per_level=2,
        heads=8,
        context_width=768,
        activation="silu",
        downsample_padding=1,
        norm_groups=32,
        norm_eps=1e-5,
        transformer_norm_eps=1e-6,
        layer_norm_eps=1e-5,
    ),
    vae=VAEConfig(
        sample_size=512,
        image_channels=3,
        latent_channels=4,
        widths=(128, 256, 512, 512),
        resnets_per_level=2,
        activation="silu",
        downsample_padding=0,
        norm_groups=32,
        norm_eps=1e-6,
        scaling_factor=0.18215,
    ),
    scheduler=MappingProxyType(
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "set_alpha_to_one": False,
            "clip_sample": False,
        }
    ),
)

# The two special tokens of CLIP's vocabulary, around every prompt.
START, END = "<|startoftext|>", "<|endoftext|>"


# ---------------------------------------------------- which settings of a noise schedule are possible

MAX_TIMESTEPS = 1_000_000  # a thousand times what anybody trains with: more is a broken file
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # those that every scheduler has
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


def check_schedule(
    settings: Mapping[str, Any],
    beta_schedules: Sequence[str] = BETA_SCHEDULES,
    timestep_spacings: Sequence[str] = TIMESTEP_SPACINGS,
) -> None:
    """Raise ValueError, with the name of the setting, for a noise schedule that is impossible.

    `settings`: a scheduler's arguments under diffusers' names, or some of them: what is absent has its default.
    """
    steps = whole("num_train_timesteps", settings.get("num_train_timesteps", 1000), 1, MAX_TIMESTEPS)
    whole("steps_offset", settings.get("steps_offset", 0), 0, MAX_TIMESTEPS)
    require_one_of(PREDICTION_TYPES, "prediction_type", settings.get("prediction_type", "epsilon"))
    require_one_of(timestep_spacings, "timestep_spacing", settings.get("timestep_spacing", timestep_spacings[0]))
    for name in ("clip_sample_range", "sample_max_value"):
        require_positive(name, settings.get(name, 1.0))
    ratio = settings.get("dynamic_thresholding_ratio", 0.995)
    require(ratio == 0 or is_between(ratio, 0, 1), "dynamic_thresholding_ratio", ratio, "a number from 0 to 1")
    if settings.get("trained_betas") is None:
        require_one_of(beta_schedules, "beta_schedule", settings.get("beta_schedule", "linear"))
        for name in ("beta_start", "beta_end"):
            value = settings.get(name, 0.01)
            require(is_between(value, 0, 1) and value < 1, name, value, "a number above 0 and below 1")
    else:
        check_betas(settings["trained_betas"], steps)
    rescaled = settings.get("rescale_betas_zero_snr")
    require(steps > 1 or not rescaled, "rescale_betas_zero_snr", rescaled, "False for a schedule of one timestep")


def check_betas(betas: Any, steps: int) -> None:
    """Raise ValueError unless `betas` are as many numbers as there are training timesteps, all possible."""
    require(hasattr(betas, "__len__") and not isinstance(betas, str), "trained_betas", betas, "a list of numbers")
    require(len(betas) == steps, "len(trained_betas)", len(betas), f"num_train_timesteps, {steps}")
    for index, beta in enumerate(betas):  # a beta of 1 is possible: zero terminal SNR ends with it
        require(is_between(beta, 0, 1), f"trained_betas[{index}]", beta, "above 0 and at most 1")


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """ValueError with the setting's name, its value and what it may be, unless `condition`."""
    if not condition:
        raise ValueError(f"{name}={shown(repr(value))}: must be {allowed}")


def require_one_of(names: Sequence[str], name: str, value: object) -> None:
    """ValueError unless `value` is one of `names`."""
    require(value in names, name, value, "one of " + ", ".join(repr(known) for known in names))


def require_positive(name: str, value: object) -> None:
    """ValueError unless `value` is a number above 0."""
    require(is_between(value, 0, math.inf), name, value, "a number above 0")


def is_between(value: object, low: float, high: float) -> bool:
    """Whether `value` is a number with low < value <= high. NaN is not, nor is a string."""
    try:
        return isinstance(value, numbers.Real) and low < float(value) <= high
    except OverflowError:  # a whole number of hundreds of digits
        return False


def whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    """`value` as an int from `low` to `high`. NumPy integers and integer tensors of one element are accepted."""
    allowed = f"a whole number, {low} or more" if high == math.inf else f"a whole number from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={shown(repr(value))}: must be {allowed}") from None
    require(low <= number <= high, name, number, allowed)
    return number
