"""Every number of the architecture that varies, in one place.

The models take these dataclasses and nothing else. No field has a default, here or in the layers: a number that is
not passed cannot be passed wrongly (every from-scratch port that we read has a wrong GroupNorm epsilon that a default
argument supplied). `SD15` is Stable Diffusion 1.5. Next in the walk: `checkpoint/keymap.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


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
    projection: int  # the width of the pooled vector that is taken too, by SDXL; 0: none is

    @property
    def openclip(self) -> bool:
        """Whether it is OpenCLIP's, of SD 2.x and SDXL, which other names in files and another padding go with."""
        return self.activation != "quick_gelu"


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The denoiser (Rombach et al. 2022, arXiv:2112.10752). Tuples go from the highest resolution to the lowest."""

    sample_size: int | tuple[int, int]  # default height and width of the latents, one number where both are equal
    in_channels: int  # 4 latent channels; 9 in inpainting models (latents, mask, masked image)
    out_channels: int
    widths: tuple[int, ...]  # channels at each resolution
    attention: tuple[bool, ...]  # does this resolution have transformers?
    depths: int | tuple[int, ...]  # layers of a transformer, at every resolution or at each
    resnets_per_level: int  # on the way down; one more on the way up
    heads: int | tuple[int, ...]  # of every resolution, or of each; diffusers calls the number attention_head_dim
    linear_projections: bool  # around a transformer: linear layers (SD 2.x), or 1x1 convolutions
    context_width: int  # the width of the text encoder
    added_width: int  # of what is added to the timestep: a pooled vector and embedded numbers (SDXL); 0: nothing is
    number_width: int  # of each of those embedded numbers, which the UNet itself need not know
    activation: str
    downsample_padding: int
    norm_groups: int
    norm_eps: float  # GroupNorm in ResNet blocks and before the last convolution
    transformer_norm_eps: float  # GroupNorm at the entry of a transformer: not the same number!
    layer_norm_eps: float  # LayerNorm inside a transformer

    def heads_at(self, level: int) -> int:
        """The number of attention heads at a resolution."""
        return self.heads if isinstance(self.heads, int) else self.heads[level]

    def depth_at(self, level: int) -> int:
        """The number of layers of a transformer at a resolution."""
        return self.depths if isinstance(self.depths, int) else self.depths[level]

    @property
    def own_size(self) -> tuple[int, int]:
        """Default height and width of the latents: a pixel size of 8 times that."""
        return (self.sample_size, self.sample_size) if isinstance(self.sample_size, int) else self.sample_size

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
    text_encoder_2: TextEncoderConfig | None  # SDXL's other one
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
        projection=0,
    ),
    unet=UNetConfig(
        sample_size=64,
        in_channels=4,
        out_channels=4,
        widths=(320, 640, 1280, 1280),
        attention=(True, True, True, False),
        depths=1,
        resnets_per_level=2,
        heads=8,
        linear_projections=False,
        context_width=768,
        added_width=0,
        number_width=0,
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
    text_encoder_2=None,
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
