"""`UNet2DConditionModel`: minisd's UNet as diffusers' tree."""

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from minisd import unet
from minisd.diffusers.models.attention_processor import HasAttention
from minisd.diffusers.models.blocks import (
    ACTIVATIONS,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    Downsample2D,
    ResnetBlock2D,
    Transformer2DModel,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
    Upsample2D,
)
from minisd.diffusers.models.network import Format, Network
from minisd.diffusers.outputs import output
from minisd.diffusers.refusing import NotCoveredError, accept, parameters
from minisd.layers import Downsample
from minisd.pixel.unet import timestep_embedding


class Timesteps(nn.Module):
    """Sinusoidal timestep embedding: `minisd.pixel.unet.timestep_embedding`."""

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, downscale_freq_shift: float) -> None:
        super().__init__()
        self.num_channels, self.flip_sin_to_cos = num_channels, flip_sin_to_cos
        self.downscale_freq_shift = downscale_freq_shift

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B,) -> (B, num_channels) float32."""
        return timestep_embedding(
            timesteps, self.num_channels, cosines_first=self.flip_sin_to_cos, shift=self.downscale_freq_shift
        )


class TimestepEmbedding(nn.Module):
    """`minisd.unet.TimeEmbedding`."""

    def __init__(self, core: unet.TimeEmbedding) -> None:
        super().__init__()
        self.linear_1, self.act, self.linear_2 = core.linear1, ACTIVATIONS[core.activation](), core.linear2

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, width) -> (B, 4 width)."""
        return self.linear_2(self.act(self.linear_1(sample)))


class UNet2DConditionModel(Network, HasAttention):
    """`minisd.unet.UNet`."""

    component, kind = "unet", unet.UNet
    format = Format.of(component)
    down_blocks: nn.ModuleList
    up_blocks: nn.ModuleList

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("class_labels", "timestep_cond", "attention_mask", "encoder_attention_mask"), (None,)),
        **dict.fromkeys(("down_block_additional_residuals", "mid_block_additional_residual"), (None,)),
        "down_intrablock_additional_residuals": (None,),
    }

    def grow(self, core: unet.UNet) -> None:
        self.conv_in = core.conv_in
        self.time_proj = Timesteps(core.config.widths[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(core.time_embedding)
        self.add_time_proj = self.add_embedding = None
        if core.added_embedding is not None:
            self.add_time_proj = Timesteps(core.config.number_width, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.add_embedding = TimestepEmbedding(core.added_embedding)
        self.down_blocks = nn.ModuleList(down_levels(core))
        self.up_blocks = nn.ModuleList(up_levels(core))
        self.mid_block = UNetMidBlock2DCrossAttn(*parts_of(list(core.middle)))
        self.conv_norm_out = core.norm_out
        self.conv_act = ACTIVATIONS[core.activation]()
        self.conv_out = core.conv_out

    def leaves_as_made(self) -> list[Any]:
        parts: list[nn.Module] = [self.conv_in, self.time_embedding]
        parts += [] if self.add_embedding is None else [self.add_embedding]
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            parts += in_turn(block)
        return leaves([*parts, self.conv_norm_out, self.conv_out])

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> Any:
        """Predict noise: `sample` (B, C, H, W), `timestep` one or (B,), text (B, T, D) -> `.sample` (B, 4, H, W).

        `cross_attention_kwargs` go to the attention processors, but for "scale", the strength of LoRAs. SDXL's takes
        `added_cond_kwargs`: "text_embeds" (B, P), the pooled vector, and "time_ids" (B, 6), the sizes.
        """
        if not isinstance(return_dict, bool):  # in fourth place diffusers has class_labels
            raise NotCoveredError(f"UNet2DConditionModel: takes three arguments by position, not {return_dict!r} too")
        accept("UNet2DConditionModel", others, self.NEUTRAL, parameters(self.forward))
        extra = dict(cross_attention_kwargs or {})
        self.scale_loras(extra.pop("scale", 1.0))
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))  # (B,)
        temb = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))  # (B, 4 * widths[0])
        temb = self.add_conditions(temb, added_cond_kwargs or {})
        eps = self.walk(self.conv_in(sample), temb, encoder_hidden_states, extra or None)
        return output(return_dict, sample=self.conv_out(self.conv_act(self.conv_norm_out(eps))))

    def add_conditions(self, temb: Tensor, added: dict[str, Any]) -> Tensor:
        """(B, 4 * widths[0]) with what SDXL's is told besides.

        Raises ValueError where that is missing, NotCoveredError for more.
        """
        wanted = {"text_embeds", "time_ids"} if self.add_embedding is not None else set()
        if set(added) != wanted:
            error = NotCoveredError if set(added) - wanted else ValueError
            raise error(f"UNet2DConditionModel: added_cond_kwargs has {sorted(added)}, and takes {sorted(wanted)} here")
        if self.add_embedding is None or self.add_time_proj is None:
            return temb
        numbers = self.add_time_proj(added["time_ids"].flatten()).unflatten(0, (len(added["text_embeds"]), -1))
        vector = torch.cat([added["text_embeds"], numbers.flatten(1)], dim=-1).to(temb.dtype)
        return temb + self.add_embedding(vector)

    def walk(self, x: Tensor, temb: Tensor, context: Tensor, extra: dict[str, Any] | None) -> Tensor:
        """Down, middle and up, from the first convolution (B, C, H, W) to before the last norm."""
        text = {
            "encoder_hidden_states": context,
            "attention_mask": None,
            "cross_attention_kwargs": extra,
            "encoder_attention_mask": None,
        }
        factor = 2 ** (len(self.config.block_out_channels) - 1)
        odd = any(size % factor for size in x.shape[-2:])
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(hidden_states=x, temb=temb, **(text if block.has_cross_attention else {}))
            skips += outputs
        x = self.mid_block(x, temb, **text)
        for block in self.up_blocks:
            count = len(cast(nn.ModuleList, block.resnets))
            taken, skips = skips[-count:], skips[:-count]
            x = block(
                hidden_states=x,
                temb=temb,
                res_hidden_states_tuple=tuple(taken),
                upsample_size=unet.size_of(skips[-1]) if odd and skips else None,
                **(text if block.has_cross_attention else {}),
            )
        return x


# ---------------------------------------------------- from the flat list to levels


def parts_of(blocks: list[Any]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The resnets of some of minisd's blocks, and their transformers."""
    resnets: list[nn.Module] = [ResnetBlock2D(block.resnet) for block in blocks if block.resnet is not None]
    return resnets, [Transformer2DModel(block.attention) for block in blocks if block.attention is not None]


def down_levels(core: unet.UNet) -> Iterator[nn.Module]:
    """Each level's blocks on the way down: some resnets, and a downsampling but on the last."""
    blocks = iter(cast(list[unet.Block], core.down))
    for level, attention in enumerate(core.config.attention):
        own = [next(blocks) for _ in range(core.config.resnets_per_level)]
        last = level == len(core.config.attention) - 1
        downsamplers = [] if last else [Downsample2D(cast(Downsample, next(blocks).downsample))]
        yield (CrossAttnDownBlock2D if attention else DownBlock2D)(*parts_of(own), downsamplers)


def up_levels(core: unet.UNet) -> Iterator[nn.Module]:
    """Each level's blocks on the way up: one resnet more."""
    blocks = iter(cast(list[unet.Block], core.up))
    for attention in reversed(core.config.attention):
        own = [next(blocks) for _ in range(core.config.resnets_per_level + 1)]
        upsamplers = [Upsample2D(block.upsample) for block in own if block.upsample is not None]
        yield (CrossAttnUpBlock2D if attention else UpBlock2D)(*parts_of(own), upsamplers)


# ---------------------------------------------------- the order in which diffusers makes layers


def in_turn(block: Any) -> Iterator[nn.Module]:
    """A block's resnets and attention layers in turn, then what changes the resolution."""
    attentions = list(getattr(block, "attentions", ()))
    for index, resnet in enumerate(block.resnets):
        yield resnet
        if index < len(attentions):
            yield attentions[index]
    for name in ("downsamplers", "upsamplers"):
        yield from getattr(block, name, None) or ()


def leaves(modules: list[nn.Module]) -> list[Any]:
    """The layers with weights in `modules`, in order."""
    found = (layer for module in modules for layer in module.modules())
    return [layer for layer in found if hasattr(layer, "reset_parameters")]
