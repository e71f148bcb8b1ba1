"""The configuration of a component out of the shapes of its tensors, where no file states it.

Widths, depths and the vocabulary show in shapes; heads, norm groups and the VAE's scaling factor do not, and are those
of Stable Diffusion 1.x. This file needs the standard library only. Next: `survey.py`.
"""

from dataclasses import replace

from minisd.checkpoint.configs import MAX_LAYERS, MAX_LEVELS
from minisd.checkpoint.header import TensorInfo
from minisd.checkpoint.keymap import ema_name
from minisd.checkpoint.naming import OPENCLIP_MARK, REFINER_PREFIX, TEXT_PREFIX, XL_MARK, Naming, Tensors, shape_of
from minisd.config import SD15, TextEncoderConfig, UNetConfig, VAEConfig
from minisd.files import CheckpointError


def infer_unet(tensors: Tensors, naming: Naming) -> UNetConfig:
    """The UNet's configuration out of its shapes. Heads and norm groups leave no trace there: SD 1.x has 8 and 32.

    SD 2.x, which its text encoder tells, has heads of 64 channels.
    """
    widths, depths, resnets = unet_levels(tensors, naming)
    conv_in, conv_out = (shape_of(tensors, naming, name) for name in ("conv_in.weight", "conv_out.weight"))
    to_k = shape_of(tensors, naming, "middle.0.attention.cross_attn.k.weight")
    if not widths or conv_in is None or conv_out is None or to_k is None or len(conv_in) != 4 or len(to_k) != 2:
        raise CheckpointError("the UNet is incomplete: its first or middle layers are missing")
    added = find(tensors, naming, "add_embedding.linear_1.weight", "label_emb.0.0.weight")
    linear = to_k[1] == 1024 or OPENCLIP_MARK in tensors or added is not None
    middle = transformer_depth(tensors, naming, "mid_block.attentions.0", "middle_block.1")
    every = [*depths[:-1], depths[-1] or middle]  # the last is the middle's too
    alike = {depth for depth in every if depth}
    return replace(
        SD15.unet,
        in_channels=conv_in[1],
        out_channels=conv_out[0],
        widths=tuple(widths),
        attention=tuple(depth > 0 for depth in depths),
        depths=alike.pop() if len(alike) == 1 else tuple(depth or 1 for depth in every),
        added_width=added.shape[1] if added and len(added.shape) == 2 else 0,
        number_width=XL_NUMBERS if added else 0,
        resnets_per_level=resnets,
        context_width=to_k[1],
        linear_projections=linear,
        heads=tuple(max(1, width // 64) for width in widths) if linear else SD15.unet.heads,
        sample_size=XL_SIZE if added else SD15.unet.sample_size,
    )


XL_NUMBERS, XL_SIZE, XL_SCALING = 256, 128, 0.13025  # number_width, sample_size, the VAE's scaling factor


def find(tensors: Tensors, naming: Naming, diffusers: str, compvis: str) -> TensorInfo | None:
    """A tensor of the UNet by either name."""
    name = diffusers if naming.column == "diffusers" else compvis
    return tensors.get(naming.prefix + (ema_name(name) if naming.column == "ema" else name))


def transformer_depth(tensors: Tensors, naming: Naming, diffusers: str, compvis: str) -> int:
    """How many layers the transformer of this name has: 0 where there is none."""
    layer = "transformer_blocks.{}.norm1.weight"
    names = [[f"{place}.{layer.format(depth)}" for place in (diffusers, compvis)] for depth in range(MAX_LAYERS)]
    return next((depth for depth, both in enumerate(names) if find(tensors, naming, *both) is None), MAX_LAYERS)


def unet_levels(tensors: Tensors, naming: Naming) -> tuple[list[int], list[int], int]:
    """Follow the UNet of the file level by level: the width of each level, its transformers' depth, its resnets."""
    widths: list[int] = []
    depths: list[int] = []
    resnets, block = 0, 1
    for level in range(MAX_LEVELS):
        for index in range(MAX_LEVELS):
            here, there = f"down_blocks.{level}", f"input_blocks.{block}"
            names = f"{here}.resnets.{index}.conv1.weight", f"{there}.0.in_layers.2.weight"
            conv = find(tensors, naming, *names)
            if conv is None:
                break
            if index == 0:
                widths.append(conv.shape[0])
                depths.append(transformer_depth(tensors, naming, f"{here}.attentions.0", f"{there}.1"))
            resnets, block = index + 1, block + 1
        if len(widths) == level:
            break
        block += 1  # CompVis counts the downsampling too
    return widths, depths, resnets


def infer_vae(tensors: Tensors, naming: Naming) -> VAEConfig:
    """The autoencoder's configuration out of its shapes. Norm groups and the scaling factor are SD 1.x's."""
    here = "encoder.down_blocks.{}.resnets.{}" if naming.column == "diffusers" else "encoder.down.{}.block.{}"
    widths: list[int] = []
    resnets = 0
    for level in range(MAX_LEVELS):
        conv = tensors.get(f"{naming.prefix}{here.format(level, 0)}.conv1.weight")
        if conv is None:
            break
        widths.append(conv.shape[0])
    while f"{naming.prefix}{here.format(0, resnets)}.conv1.weight" in tensors and resnets < MAX_LEVELS:
        resnets += 1
    conv_in = shape_of(tensors, naming, "encoder.conv_in.weight")
    latent = shape_of(tensors, naming, "decoder.conv_in.weight")
    if not widths or conv_in is None or latent is None or len(conv_in) != 4 or len(latent) != 4:
        raise CheckpointError("the VAE is incomplete: its first layers are missing")
    return replace(
        SD15.vae,
        image_channels=conv_in[1],
        latent_channels=latent[1],
        widths=tuple(widths),
        resnets_per_level=resnets,
        scaling_factor=XL_SCALING if XL_MARK in tensors else SD15.vae.scaling_factor,
    )


def infer_text_encoder(tensors: Tensors, naming: Naming) -> TextEncoderConfig:
    """The text encoder's configuration out of its shapes. All CLIP text encoders have heads of 64 channels.

    Of OpenCLIP's 24 layers SD 2.x uses 23: what the last but one gives, normalised.
    """
    openclip = naming.column == "compvis"
    projection = projection_of(tensors, naming)
    tokens = shape_of(tensors, naming, "token_embedding.weight")
    positions = shape_of(tensors, naming, "position_embedding.weight")
    hidden = shape_of(tensors, naming, "layers.0.feed_forward.expand.weight")
    layers = 0
    middle = "" if naming.bare_text else TEXT_PREFIX
    layer = "model.transformer.resblocks.{}.ln_1" if openclip else middle + "encoder.layers.{}.layer_norm1"
    while naming.prefix + layer.format(layers) + ".weight" in tensors and layers < MAX_LAYERS:
        layers += 1
    if not (tokens and positions and hidden) or not len(tokens) == len(positions) == len(hidden) == 2 or not layers:
        raise CheckpointError("the text encoder is incomplete: its embeddings or first layer are missing")
    return replace(
        SD15.text_encoder,
        vocabulary=tokens[0],
        width=tokens[1],
        heads=max(1, tokens[1] // 64),
        layers=23 if openclip and layers == 24 else layers,
        activation="gelu" if openclip or projection else SD15.text_encoder.activation,
        projection=projection,
        context_length=positions[0],
        hidden_width=hidden[0],
    )


def projection_of(tensors: Tensors, naming: Naming) -> int:
    """The width of the pooled vector of SDXL's second text encoder, or its refiner's only one."""
    name = "model.text_projection/t" if naming.column == "compvis" else "text_projection.weight"
    found = tensors.get(naming.prefix + name)
    takes = naming.component == "text_encoder_2" or naming.prefix.endswith(REFINER_PREFIX)
    return found.shape[0] if found and takes else 0


INFER = {
    "unet": infer_unet,
    "vae": infer_vae,
    "text_encoder": infer_text_encoder,
    "text_encoder_2": infer_text_encoder,
}
