"""`UNet2DModel`: minisd's pixel-space UNet as diffusers' tree."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from minisd.checkpoint.survey import Part
from minisd.diffusers.loading import Source, folder_of_network, note_part
from minisd.diffusers.models.attention_processor import Attention, HasAttention
from minisd.diffusers.models.blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    DownBlock2D,
    Downsample2D,
    ResnetBlock2D,
    UNetMidBlock2D,
    UpBlock2D,
    Upsample2D,
)
from minisd.diffusers.models.network import Format, Network
from minisd.diffusers.models.unet import TimestepEmbedding, Timesteps, in_turn, leaves
from minisd.diffusers.outputs import Output as UNet2DOutput
from minisd.diffusers.outputs import output
from minisd.layers import Upsample
from minisd.pixel import files, unet
from minisd.pixel.keys import pixel_unet_keys
from minisd.unet import TimeEmbedding

__all__ = ["UNet2DModel", "UNet2DOutput"]


class UNet2DModel(Network, HasAttention):
    """`minisd.pixel.unet.PixelUNet`: from a noisy picture, and perhaps a class, to its noise."""

    component, kind = "unet", unet.PixelUNet
    format = Format(files.FIELDS.neutral, files.read_config, files.write_config, pixel_unet_keys)
    down_blocks: nn.ModuleList
    up_blocks: nn.ModuleList
    mid_block: UNetMidBlock2D | None
    class_embedding: nn.Module | None

    @classmethod
    def open_part(cls, source: Source, subfolder: str | None, variant: str | None) -> Part:
        folder: Path = folder_of_network(source, cls.component, subfolder, variant)
        return note_part(files.open_unet(folder, half=variant == "fp16"), variant)

    def grow(self, core: unet.PixelUNet) -> None:
        config, classes = core.config, core.class_embedding
        self.conv_in = core.conv_in
        self.time_proj = Timesteps(config.widths[0], config.cosines_first, config.frequency_shift)
        self.time_embedding = TimestepEmbedding(core.time_embedding)
        if config.class_embedding == "identity":
            classes = nn.Identity()
        self.class_embedding = TimestepEmbedding(classes) if isinstance(classes, TimeEmbedding) else classes
        self.down_blocks = nn.ModuleList(down_levels(core))
        self.up_blocks = nn.ModuleList(up_levels(core))
        self.mid_block = UNetMidBlock2D(*parts_of(list(core.middle))) if config.middle else None
        self.conv_norm_out, self.conv_act, self.conv_out = core.norm_out, nn.SiLU(), core.conv_out

    def leaves_as_made(self) -> list[Any]:
        parts = [self.conv_in, self.time_embedding, self.class_embedding or nn.Identity()]
        for block in (*self.down_blocks, *([self.mid_block] if self.mid_block else ()), *self.up_blocks):
            parts += in_turn(block)
        return leaves([*parts, self.conv_norm_out, self.conv_out])

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict noise: `sample` (B, C, H, W), `timestep` one or (B,), labels (B,) -> `.sample`, shaped as it."""
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))  # (B,)
        emb = self.embed(timesteps, class_labels)
        x = self.conv_in(sample)
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(hidden_states=x, temb=emb)
            skips += outputs
        if self.mid_block is not None:
            x = self.mid_block(x, emb)
        for block in self.up_blocks:
            count = len(cast(nn.ModuleList, block.resnets))
            taken, skips = skips[-count:], skips[:-count]
            x = block(x, tuple(taken), emb)
        return output(return_dict, sample=self.conv_out(self.conv_act(self.conv_norm_out(x))))

    def embed(self, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """Timesteps and labels, (B,) each -> (B, 4 * widths[0])."""
        emb: Tensor = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        if self.class_embedding is None:
            if labels is not None:
                raise ValueError("class_labels: this UNet has no class embedding")
            return emb
        if labels is None:
            raise ValueError("class_labels: must be given, as this UNet has a class embedding")
        if self.config.class_embed_type == "timestep":
            labels = self.time_proj(labels)
        return emb + self.class_embedding(labels).to(self.dtype)


# ---------------------------------------------------- from the flat list to levels


def parts_of(blocks: list[Any]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The resnets of some of minisd's blocks, and their attention layers."""
    attentions = [block.attention for block in blocks if block.attention is not None]
    return (
        [ResnetBlock2D(block.resnet) for block in blocks],
        [Attention(one.attn, crosses=False, group_norm=one.norm, residual=True, scale=one.scale) for one in attentions],
    )


def down_levels(core: unet.PixelUNet) -> Iterator[nn.Module]:
    """Each level's blocks on the way down: some resnets, and a downsampling but on the last."""
    blocks = iter(cast(list[unet.PixelBlock], core.down))
    for level, attends in enumerate(core.config.down_attention):
        own = [next(blocks) for _ in range(core.config.resnets_per_level)]
        downsamplers: list[nn.Module] = []
        if level < len(core.config.widths) - 1:
            last = next(blocks)
            downsamplers = [Downsample2D(last.downsample) if last.downsample else ResnetBlock2D(cast(Any, last.resnet))]
        yield (AttnDownBlock2D if attends else DownBlock2D)(*parts_of(own), downsamplers)


def up_levels(core: unet.PixelUNet) -> Iterator[nn.Module]:
    """Each level's blocks on the way up: one resnet more."""
    blocks = iter(cast(list[unet.PixelBlock], core.up))
    for attends in core.config.up_attention:
        own = [next(blocks) for _ in range(core.config.resnets_per_level + 1)]
        found = [block.upsample for block in own if block.upsample is not None]
        upsamplers = [Upsample2D(one) if isinstance(one, Upsample) else ResnetBlock2D(one) for one in found]
        yield (AttnUpBlock2D if attends else UpBlock2D)(*parts_of(own), upsamplers)
