"""One weight, three names: minisd | diffusers | CompVis.

Parts say once what is inside a block and how each of the three calls it. A traversal of the architecture then
puts the parts in their places. For Stable Diffusion 1.5 that expands to 1,130 names (UNet 686, VAE 248, text encoder
196), one to one in all three columns; other widths and depths of the family expand the same way. Names are expanded,
never matched: there is no pattern, no replacement and no order to respect. Writing a file is the same lookup backwards.

This file needs the standard library only.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from minisd.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig

Shape = tuple[int, ...]

COMPONENTS = ("unet", "vae", "text_encoder")
FAMILY = (*COMPONENTS, "text_encoder_2")  # of which SDXL has the last

# Where each component begins in a CompVis single file. (In diffusers' layout each has a folder of its own.)
COMPVIS_PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
XL_PREFIX = {  # and in one of SDXL
    **COMPVIS_PREFIX,
    "text_encoder": "conditioner.embedders.0.",
    "text_encoder_2": "conditioner.embedders.1.",
}


def prefixes(configs: Mapping[str, Any]) -> dict[str, str]:
    """Where each component of a model begins in a single file, by their configurations: SDXL's have their own places.

    Its refiner has one text encoder, with a pooled vector.
    """
    text = configs.get("text_encoder")
    return XL_PREFIX if configs.get("text_encoder_2") or (text and text.projection) else COMPVIS_PREFIX


@dataclass(frozen=True, slots=True)
class Key:
    """One tensor. `diffusers` and `compvis` are relative to the component's folder and prefix."""

    minisd: str
    diffusers: str
    compvis: str
    shape: Shape
    compvis_shape: Shape  # differs for the 8 attention matrices of the VAE: 1x1 convolutions in CompVis
    older: tuple[str, ...]  # names that earlier releases of diffusers gave it


@dataclass(frozen=True, slots=True)
class Part:
    """One layer of a block: its three names, and its kind with its sizes."""

    minisd: str
    diffusers: str
    older: tuple[str, ...]
    compvis: str
    kind: str
    sizes: tuple[str, ...]


def parts(table: str) -> list[Part]:
    """Read a table: minisd | diffusers (or an older name) | CompVis (= the same) | kind and sizes.

    In CompVis' column `*` stands for "weight" or "bias", which else follows behind a dot, or not at all behind "!".
    """
    rows = []
    for line in table.strip().splitlines():
        minisd, diffusers, compvis, layer = (column.strip() for column in line.split("|"))
        diffusers, *older = diffusers.split(" or ")
        kind, *sizes = layer.split()
        rows.append(Part(minisd, diffusers, tuple(older), diffusers if compvis == "=" else compvis, kind, tuple(sizes)))
    return rows


# kind -> tensors; i = in, o = out. A `pixelwise` layer is linear, but CompVis wrote it as a 1x1 convolution.
TENSORS: dict[str, dict[str, str]] = {
    "norm": {"weight": "o", "bias": "o"},
    "conv3": {"weight": "o i 3 3", "bias": "o"},
    "conv1": {"weight": "o i 1 1", "bias": "o"},
    "linear": {"weight": "o i", "bias": "o"},
    "pixelwise": {"weight": "o i", "bias": "o"},
    "matrix": {"weight": "o i"},
    "table": {"weight": "i o"},
}

UNET_RESNET = parts("""
    norm1    | norm1         | in_layers.0     | norm i
    conv1    | conv1         | in_layers.2     | conv3 i o
    time     | time_emb_proj | emb_layers.1    | linear time o
    norm2    | norm2         | out_layers.0    | norm o
    conv2    | conv2         | out_layers.3    | conv3 o o
    shortcut | conv_shortcut | skip_connection | conv1 i o
""")

TRANSFORMER_IN = parts("""
    norm     | norm     | = | norm c
    proj_in  | proj_in  | = | conv1 c c
""")

TRANSFORMER_LAYER = parts("""
    self_attn_norm        | norm1         | = | norm c
    self_attn.q           | attn1.to_q    | = | matrix c c
    self_attn.k           | attn1.to_k    | = | matrix c c
    self_attn.v           | attn1.to_v    | = | matrix c c
    self_attn.out         | attn1.to_out.0 | = | linear c c
    cross_attn_norm       | norm2         | = | norm c
    cross_attn.q          | attn2.to_q    | = | matrix c c
    cross_attn.k          | attn2.to_k    | = | matrix context c
    cross_attn.v          | attn2.to_v    | = | matrix context c
    cross_attn.out        | attn2.to_out.0 | = | linear c c
    feed_forward_norm     | norm3         | = | norm c
    feed_forward.expand   | ff.net.0.proj | = | linear c 8c
    feed_forward.contract | ff.net.2      | = | linear 4c c
""")

TRANSFORMER_OUT = parts("proj_out | proj_out | = | conv1 c c")

ADDED_EMBEDDING = parts("""
    added_embedding.linear1 | add_embedding.linear_1 | label_emb.0.0 | linear added time
    added_embedding.linear2 | add_embedding.linear_2 | label_emb.0.2 | linear time time
""")

DOWNSAMPLE = parts("conv | conv | op | conv3 c c")
UPSAMPLE = parts("conv | conv | = | conv3 c c")

UNET_ENDS = parts("""
    time_embedding.linear1 | time_embedding.linear_1 | time_embed.0     | linear first time
    time_embedding.linear2 | time_embedding.linear_2 | time_embed.2     | linear time time
    conv_in                | conv_in                 | input_blocks.0.0 | conv3 in first
    norm_out               | conv_norm_out           | out.0            | norm first
    conv_out               | conv_out                | out.2            | conv3 first out
""")

VAE_RESNET = parts("""
    norm1    | norm1         | =            | norm i
    conv1    | conv1         | =            | conv3 i o
    norm2    | norm2         | =            | norm o
    conv2    | conv2         | =            | conv3 o o
    shortcut | conv_shortcut | nin_shortcut | conv1 i o
""")

VAE_ATTENTION = parts("""
    norm     | group_norm            | norm     | norm c
    attn.q   | to_q or query         | q        | pixelwise c c
    attn.k   | to_k or key           | k        | pixelwise c c
    attn.v   | to_v or value         | v        | pixelwise c c
    attn.out | to_out.0 or proj_attn | proj_out | pixelwise c c
""")

VAE_RESAMPLE = parts("conv | conv | = | conv3 c c")

VAE_ENDS = parts("""
    encoder.conv_in  | encoder.conv_in       | =                | conv3 image first
    encoder.norm_out | encoder.conv_norm_out | encoder.norm_out | norm last
    encoder.conv_out | encoder.conv_out      | =                | conv3 last moments
    quant_conv       | quant_conv            | =                | conv1 moments moments
    post_quant_conv  | post_quant_conv       | =                | conv1 latent latent
    decoder.conv_in  | decoder.conv_in       | =                | conv3 latent last
    decoder.norm_out | decoder.conv_norm_out | decoder.norm_out | norm first
    decoder.conv_out | decoder.conv_out      | =                | conv3 first image
""")

TEXT_LAYER = parts("""
    self_attn_norm        | layer_norm1        | = | norm c
    self_attn.q           | self_attn.q_proj   | = | linear c c
    self_attn.k           | self_attn.k_proj   | = | linear c c
    self_attn.v           | self_attn.v_proj   | = | linear c c
    self_attn.out         | self_attn.out_proj | = | linear c c
    feed_forward_norm     | layer_norm2        | = | norm c
    feed_forward.expand   | mlp.fc1            | = | linear c hidden
    feed_forward.contract | mlp.fc2            | = | linear hidden c
""")

TEXT_ENDS = parts("""
    token_embedding    | text_model.embeddings.token_embedding    | = | table vocabulary c
    position_embedding | text_model.embeddings.position_embedding | = | table positions c
    final_norm         | text_model.final_layer_norm              | = | norm c
""")

# Single files of SD 2.x have OpenCLIP's names. Queries, keys and values are thirds of one tensor there: "/q" and so on.
OPENCLIP_LAYER = parts("""
    self_attn_norm        | layer_norm1        | ln_1             | norm c
    self_attn.q           | self_attn.q_proj   | attn.in_proj_*/q | linear c c
    self_attn.k           | self_attn.k_proj   | attn.in_proj_*/k | linear c c
    self_attn.v           | self_attn.v_proj   | attn.in_proj_*/v | linear c c
    self_attn.out         | self_attn.out_proj | attn.out_proj    | linear c c
    feed_forward_norm     | layer_norm2        | ln_2             | norm c
    feed_forward.expand   | mlp.fc1            | mlp.c_fc         | linear c hidden
    feed_forward.contract | mlp.fc2            | mlp.c_proj       | linear hidden c
""")

OPENCLIP_ENDS = parts("""
    token_embedding    | text_model.embeddings.token_embedding    | token_embedding       | table vocabulary c
    position_embedding | text_model.embeddings.position_embedding | positional_embedding! | table positions c
    final_norm         | text_model.final_layer_norm              | ln_final              | norm c
""")

# OpenCLIP multiplies by it from the right: transposed, "/t".
OPENCLIP_PROJECTION = parts("projection | text_projection | text_projection/t! | matrix c projection")


def place(block: list[Part], minisd: str, diffusers: str, compvis: str, **sizes: int) -> Iterator[Key]:
    """Put a block at its three places, each a prefix ("" or ending in a dot), with its sizes filled in."""
    if sizes.get("i") == sizes.get("o"):  # widths that agree need no shortcut
        block = [part for part in block if part.minisd != "shortcut"]
    for part in block:
        dims = [sizes[name] for name in part.sizes]
        numbers = {"i": dims[0], "o": dims[-1], "3": 3, "1": 1}
        for tensor, layout in TENSORS[part.kind].items():
            shape = tuple(numbers[letter] for letter in layout.split())
            yield Key(
                minisd=f"{minisd}{part.minisd}.{tensor}",
                diffusers=f"{diffusers}{part.diffusers}.{tensor}",
                compvis=compvis + spelt(part.compvis, tensor),
                shape=shape,
                compvis_shape=(*shape, 1, 1) if part.kind == "pixelwise" and tensor == "weight" else shape,
                older=tuple(f"{diffusers}{name}.{tensor}" for name in part.older),
            )


def spelt(name: str, tensor: str) -> str:
    """A name in CompVis' column with its "weight" or "bias": see `parts`."""
    if name.endswith("!"):
        return name[:-1]
    return name.replace("*", tensor) if "*" in name else f"{name}.{tensor}"


def unet_keys(config: UNetConfig) -> Iterator[Key]:
    """The whole UNet: time embedding and end layers, down, middle, up."""
    ends = {
        "in": config.in_channels,
        "out": config.out_channels,
        "first": config.widths[0],
        "time": config.time_width,
    }
    yield from place(UNET_ENDS, "", "", "", **ends)
    if config.added_width:
        yield from place(ADDED_EMBEDDING, "", "", "", added=config.added_width, time=config.time_width)
    yield from unet_down(config)
    yield from unet_middle(config)
    yield from unet_up(config)


def unet_block(
    config: UNetConfig, here: str, folder: str, index: int, compvis: str, i: int, o: int, depth: int
) -> Iterator[Key]:
    """A resnet from width i to o, and the transformer of so many layers that may follow it."""
    names = f"{here}.resnet.", f"{folder}.resnets.{index}.", f"{compvis}.0."
    yield from place(UNET_RESNET, *names, i=i, o=o, time=config.time_width)
    if depth:
        names = f"{here}.attention.", f"{folder}.attentions.{index}.", f"{compvis}.1."
        yield from unet_transformer(config, *names, width=o, depth=depth)


def unet_transformer(
    config: UNetConfig, here: str, diffusers: str, compvis: str, width: int, depth: int
) -> Iterator[Key]:
    """A transformer: what leads into it, its layers, what leads out of it."""
    sizes = {"c": width, "4c": 4 * width, "8c": 8 * width, "context": config.context_width}
    first, last = (
        [replace(part, kind="linear") if part.kind == "conv1" and config.linear_projections else part for part in block]
        for block in (TRANSFORMER_IN, TRANSFORMER_OUT)
    )
    yield from place(first, here, diffusers, compvis, **sizes)
    for layer in range(depth):
        inside, block = f"{here}more.{layer - 1}." if layer else here, f"transformer_blocks.{layer}."
        yield from place(TRANSFORMER_LAYER, inside, diffusers + block, compvis + block, **sizes)
    yield from place(last, here, diffusers, compvis, **sizes)


def unet_down(config: UNetConfig) -> Iterator[Key]:
    """The down blocks. CompVis counts `conv_in` among the blocks, so its numbers are one ahead."""
    block, width = 0, config.widths[0]
    for level, level_width in enumerate(config.widths):
        folder, depth = f"down_blocks.{level}", config.attention[level] * config.depth_at(level)
        for index in range(config.resnets_per_level):
            here, compvis = f"down.{block}", f"input_blocks.{block + 1}"
            yield from unet_block(config, here, folder, index, compvis, width, level_width, depth)
            block, width = block + 1, level_width
        if level < len(config.widths) - 1:
            here, compvis = f"down.{block}.downsample.", f"input_blocks.{block + 1}.0."
            yield from place(DOWNSAMPLE, here, f"{folder}.downsamplers.0.", compvis, c=width)
            block += 1


def unet_middle(config: UNetConfig) -> Iterator[Key]:
    """The middle block: a resnet with a transformer, and a resnet."""
    width = config.widths[-1]
    yield from unet_block(config, "middle.0", "mid_block", 0, "middle_block", width, width, config.depth_at(-1))
    names = "middle.1.resnet.", "mid_block.resnets.1.", "middle_block.2."
    yield from place(UNET_RESNET, *names, i=width, o=width, time=config.time_width)


def unet_up(config: UNetConfig) -> Iterator[Key]:
    """The up blocks. Each takes the previous output and a skip connection, concatenated along the channels."""
    block, width, skips = 0, config.widths[-1], config.skip_widths
    for level, level_width in reversed(list(enumerate(config.widths))):
        folder = f"up_blocks.{len(config.widths) - 1 - level}"
        depth = config.attention[level] * config.depth_at(level)
        for index in range(config.resnets_per_level + 1):
            here, compvis = f"up.{block}", f"output_blocks.{block}"
            yield from unet_block(config, here, folder, index, compvis, width + skips.pop(), level_width, depth)
            block, width = block + 1, level_width
        if level > 0:  # CompVis puts it behind the transformer, or behind the resnet where there is none
            compvis = f"{compvis}.{2 if depth else 1}."
            yield from place(UPSAMPLE, f"{here}.upsample.", f"{folder}.upsamplers.0.", compvis, c=width)


def vae_keys(config: VAEConfig) -> Iterator[Key]:
    """The whole autoencoder: end layers, encoder, decoder."""
    channels, widths = config.latent_channels, config.widths
    sizes = {"image": config.image_channels, "latent": channels, "moments": 2 * channels}
    yield from place(VAE_ENDS, "", "", "", first=widths[0], last=widths[-1], **sizes)
    yield from vae_encoder(config)
    yield from vae_middle(config, "encoder")
    yield from vae_middle(config, "decoder")
    yield from vae_decoder(config)


def vae_middle(config: VAEConfig, half: str) -> Iterator[Key]:
    """A resnet, attention, a resnet: at the lowest resolution of either half."""
    mid, width = f"{half}.mid_block", config.widths[-1]
    yield from place(VAE_RESNET, f"{half}.middle.0.", f"{mid}.resnets.0.", f"{half}.mid.block_1.", i=width, o=width)
    yield from place(VAE_ATTENTION, f"{half}.middle.1.", f"{mid}.attentions.0.", f"{half}.mid.attn_1.", c=width)
    yield from place(VAE_RESNET, f"{half}.middle.2.", f"{mid}.resnets.1.", f"{half}.mid.block_2.", i=width, o=width)


def vae_encoder(config: VAEConfig) -> Iterator[Key]:
    """The encoder's down blocks."""
    block, width = 0, config.widths[0]
    for level, level_width in enumerate(config.widths):
        here, there = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        for index in range(config.resnets_per_level):
            names = f"encoder.down.{block}.", f"{here}.resnets.{index}.", f"{there}.block.{index}."
            yield from place(VAE_RESNET, *names, i=width, o=level_width)
            block, width = block + 1, level_width
        if level < len(config.widths) - 1:
            names = f"encoder.down.{block}.", f"{here}.downsamplers.0.", f"{there}.downsample."
            yield from place(VAE_RESAMPLE, *names, c=width)
            block += 1


def vae_decoder(config: VAEConfig) -> Iterator[Key]:
    """The decoder's up blocks. CompVis numbers its levels by resolution, so they come in reverse."""
    block, width = 0, config.widths[-1]
    for level, level_width in reversed(list(enumerate(config.widths))):
        here, there = f"decoder.up_blocks.{len(config.widths) - 1 - level}", f"decoder.up.{level}"
        for index in range(config.resnets_per_level + 1):
            names = f"decoder.up.{block}.", f"{here}.resnets.{index}.", f"{there}.block.{index}."
            yield from place(VAE_RESNET, *names, i=width, o=level_width)
            block, width = block + 1, level_width
        if level > 0:
            names = f"decoder.up.{block}.", f"{here}.upsamplers.0.", f"{there}.upsample."
            yield from place(VAE_RESAMPLE, *names, c=width)
            block += 1


def text_encoder_keys(config: TextEncoderConfig) -> Iterator[Key]:
    """The whole text encoder. Single files have the names that transformers gave, or, of SD 2.x, OpenCLIP's."""
    sizes = {"vocabulary": config.vocabulary, "positions": config.context_length}
    ends, inside = (OPENCLIP_ENDS, OPENCLIP_LAYER) if config.openclip else (TEXT_ENDS, TEXT_LAYER)
    top = "model." if config.openclip else "transformer."
    yield from place(ends, "", "", top, c=config.width, **sizes)
    if config.projection:
        yield from place(OPENCLIP_PROJECTION, "", "", top, c=config.width, projection=config.projection)
    for layer in range(config.layers):
        folder = f"text_model.encoder.layers.{layer}."
        there = f"{top}transformer.resblocks.{layer}." if config.openclip else top + folder
        yield from place(inside, f"layers.{layer}.", folder, there, c=config.width, hidden=config.hidden_width)


KEYS: dict[str, Callable[[Any], Iterator[Key]]] = {
    "unet": unet_keys,
    "vae": vae_keys,
    "text_encoder": text_encoder_keys,
    "text_encoder_2": text_encoder_keys,
}


def model_keys(config: ModelConfig) -> dict[str, list[Key]]:
    """The whole table, by component."""
    return {component: list(KEYS[component](getattr(config, component))) for component in components_of(config)}


def components_of(config: ModelConfig) -> list[str]:
    """Those that a model has."""
    return [name for name in FAMILY if getattr(config, name) is not None]


def ema_name(compvis: str) -> str:
    """Where a CompVis file keeps the moving average of a UNet tensor: its name with all dots taken out."""
    return "model_ema.diffusion_model" + compvis.replace(".", "")
