"""One weight of the pixel-space UNet, three names: minisd | diffusers | CompVis.

The third column is the naming of the first PyTorch code of DDPM and DDIM on pixels, which CompVis' VAE has kept.
See `minisd.checkpoint.keymap`. This file needs the standard library only.
"""

from collections.abc import Iterator

from minisd.checkpoint.keymap import UPSAMPLE, VAE_ATTENTION, Key, parts, place
from minisd.pixel.config import PixelUNetConfig

RESNET = parts("""
    norm1    | norm1         | =            | norm i
    conv1    | conv1         | =            | conv3 i o
    time     | time_emb_proj | temb_proj    | linear time shifts
    norm2    | norm2         | =            | norm o
    conv2    | conv2         | =            | conv3 o o
    shortcut | conv_shortcut | nin_shortcut | conv1 i o
""")
BARE_ATTENTION = [part for part in VAE_ATTENTION if part.minisd != "norm"]
ENDS = parts("""
    time_embedding.linear1 | time_embedding.linear_1 | temb.dense.0 | linear first time
    time_embedding.linear2 | time_embedding.linear_2 | temb.dense.1 | linear time time
    conv_in                | conv_in                 | =            | conv3 in first
    norm_out               | conv_norm_out           | norm_out     | norm first
    conv_out               | conv_out                | =            | conv3 first out
""")
CLASSES = {
    "table": parts("class_embedding | class_embedding | = | table classes time"),
    "timestep": parts("""
        class_embedding.linear1 | class_embedding.linear_1 | = | linear first time
        class_embedding.linear2 | class_embedding.linear_2 | = | linear time time
    """),
}


def pixel_unet_keys(config: PixelUNetConfig) -> Iterator[Key]:
    """The whole UNet: end layers, classes, down, middle, up."""
    first, time = config.widths[0], config.time_width
    sizes = {"first": first, "time": time, "in": config.in_channels, "out": config.out_channels}
    yield from place(ENDS, "", "", "", **sizes)
    yield from place(CLASSES.get(config.class_embedding or "", []), "", "", "", classes=config.classes or 0, **sizes)
    yield from down_keys(config)
    if config.middle:
        yield from middle_keys(config)
    yield from up_keys(config)


def resnet(config: PixelUNetConfig, minisd: str, diffusers: str, compvis: str, i: int, o: int) -> Iterator[Key]:
    shifts = 2 * o if config.scale_shift else o
    yield from place(
        RESNET, f"{minisd}.", f"{diffusers}.", f"{compvis}.", i=i, o=o, time=config.time_width, shifts=shifts
    )


def down_keys(config: PixelUNetConfig) -> Iterator[Key]:
    block, width = 0, config.widths[0]
    for level, level_width in enumerate(config.widths):
        folder, there = f"down_blocks.{level}", f"down.{level}"
        for index in range(config.resnets_per_level):
            names = f"down.{block}.resnet", f"{folder}.resnets.{index}", f"{there}.block.{index}"
            yield from resnet(config, *names, width, level_width)
            if config.down_attention[level]:
                names = f"down.{block}.attention.", f"{folder}.attentions.{index}.", f"{there}.attn.{index}."
                yield from place(VAE_ATTENTION, *names, c=level_width)
            block, width = block + 1, level_width
        if level < len(config.widths) - 1:
            if config.down_attention[level] and config.downsample == "resnet":
                names = f"down.{block}.resnet", f"{folder}.downsamplers.0", f"{there}.downsample"
                yield from resnet(config, *names, width, width)
            else:
                names = f"down.{block}.downsample.", f"{folder}.downsamplers.0.", f"{there}.downsample."
                yield from place(UPSAMPLE, *names, c=width)
            block += 1


def middle_keys(config: PixelUNetConfig) -> Iterator[Key]:
    width = config.widths[-1]
    yield from resnet(config, "middle.0.resnet", "mid_block.resnets.0", "mid.block_1", width, width)
    if config.middle_attention:
        attention = BARE_ATTENTION if config.middle_attention_groups is None else VAE_ATTENTION
        yield from place(attention, "middle.0.attention.", "mid_block.attentions.0.", "mid.attn_1.", c=width)
    yield from resnet(config, "middle.1.resnet", "mid_block.resnets.1", "mid.block_2", width, width)


def up_keys(config: PixelUNetConfig) -> Iterator[Key]:
    """The way up. CompVis numbers its levels by resolution, so they come in reverse."""
    block, width, skips, last = 0, config.widths[-1], config.skip_widths, len(config.widths) - 1
    for level, level_width in reversed(list(enumerate(config.widths))):
        folder, there, attends = f"up_blocks.{last - level}", f"up.{level}", config.up_attention[last - level]
        for index in range(config.resnets_per_level + 1):
            names = f"up.{block}.resnet", f"{folder}.resnets.{index}", f"{there}.block.{index}"
            yield from resnet(config, *names, width + skips.pop(), level_width)
            if attends:
                names = f"up.{block}.attention.", f"{folder}.attentions.{index}.", f"{there}.attn.{index}."
                yield from place(VAE_ATTENTION, *names, c=level_width)
            block, width = block + 1, level_width
        if level > 0:
            names = f"up.{block - 1}.upsample", f"{folder}.upsamplers.0", f"{there}.upsample"
            if attends and config.upsample == "resnet":
                yield from resnet(config, *names, width, width)
            else:
                yield from place(UPSAMPLE, *(f"{name}." for name in names), c=width)
