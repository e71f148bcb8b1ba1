"""diffusers' config.json <-> minisd's dataclasses.

Three lists for each component: the fields that minisd uses (under its own names), the fields that it knows and accepts
at one value only, because it does what that value says, and the fields that change nothing here. Anything else is
reported and ignored. This file needs the standard library only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from minisd.config import SD15, TextEncoderConfig, UNetConfig, VAEConfig
from minisd.files import CheckpointError, shown


@dataclass(frozen=True)
class Fields:
    """How a component's config.json is read."""

    used: dict[str, tuple[str, Any]]  # diffusers' name -> (minisd's name, diffusers' own value for an absent field)
    neutral: dict[str, Any]  # diffusers' name -> the only value that minisd does
    silent: frozenset[str]  # fields that do not change any number here


UNET = Fields(
    used={
        "sample_size": ("sample_size", 64),
        "in_channels": ("in_channels", 4),
        "out_channels": ("out_channels", 4),
        "block_out_channels": ("widths", [320, 640, 1280, 1280]),
        "layers_per_block": ("resnets_per_level", 2),
        "attention_head_dim": ("heads", 8),
        "use_linear_projection": ("linear_projections", False),
        "transformer_layers_per_block": ("depths", 1),
        "cross_attention_dim": ("context_width", 1280),
        "projection_class_embeddings_input_dim": ("added_width", 0),
        "addition_time_embed_dim": ("number_width", 0),
        "act_fn": ("activation", "silu"),
        "downsample_padding": ("downsample_padding", 1),
        "norm_num_groups": ("norm_groups", 32),
        "norm_eps": ("norm_eps", 1e-5),
    },
    neutral={
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "mid_block_scale_factor": 1,
        "mid_block_only_cross_attention": None,
        "only_cross_attention": False,
        "dropout": 0.0,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "attention_type": "default",
    },
    silent=frozenset(
        {
            "down_block_types",  # and these
            "up_block_types",
            "addition_embed_type",  # read by read_unet
            "addition_embed_type_num_heads",
            "upcast_attention",  # done by no attention kernel of torch's: without effect in diffusers too
        }
    ),
)

VAE = Fields(
    used={
        "sample_size": ("sample_size", 32),
        "in_channels": ("image_channels", 3),
        "latent_channels": ("latent_channels", 4),
        "block_out_channels": ("widths", [64]),
        "layers_per_block": ("resnets_per_level", 1),
        "act_fn": ("activation", "silu"),
        "norm_num_groups": ("norm_groups", 32),
        "scaling_factor": ("scaling_factor", 0.18215),  # absent from early SD 1.x files
    },
    neutral={
        "latents_mean": None,
        "latents_std": None,
        "shift_factor": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    silent=frozenset({"force_upcast", "out_channels", "down_block_types", "up_block_types"}),
)

TEXT_ENCODER = Fields(
    used={
        "vocab_size": ("vocabulary", 49408),
        "max_position_embeddings": ("context_length", 77),
        "hidden_size": ("width", 512),
        "num_hidden_layers": ("layers", 12),
        "num_attention_heads": ("heads", 8),
        "intermediate_size": ("hidden_width", 2048),
        "hidden_act": ("activation", "quick_gelu"),
        "layer_norm_eps": ("layer_norm_eps", 1e-5),
    },
    neutral={"attention_dropout": 0.0, "dropout": 0.0, "use_attention_mask": False},
    silent=frozenset(
        "architectures bos_token_id eos_token_id pad_token_id dtype torch_dtype initializer_factor initializer_range "
        "model_type projection_dim transformers_version use_cache return_dict output_attentions output_hidden_states "
        "tie_word_embeddings chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder".split()
    ),
)


# What diffusers has in its code and no config.json can say.
HARD_CODED: dict[str, dict[str, Any]] = {
    "unet": {"transformer_norm_eps": SD15.unet.transformer_norm_eps, "layer_norm_eps": SD15.unet.layer_norm_eps},
    "vae": {"norm_eps": SD15.vae.norm_eps, "downsample_padding": SD15.vae.downsample_padding},
}


def check_hard_coded(component: str, config: Any) -> None:
    """Raise ValueError for a number that would be lost, because the file has no place for it."""
    for name, value in HARD_CODED[component].items():
        if getattr(config, name) != value:
            raise ValueError(f"{component}: {name}={getattr(config, name)!r} cannot be saved: files imply {value!r}")


def read_fields(table: Fields, config: Mapping[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    """minisd's arguments out of diffusers' fields; unknown fields go to `notes`, unsupported values are errors."""
    unknown = []
    for name, value in config.items():
        if name.startswith("_") or name in table.used or name in table.silent:
            continue
        if name not in table.neutral:
            unknown.append(name)
        elif value != table.neutral[name] and not (value is None and table.neutral[name] is False):
            stated = f"{shown(name)}={shown(repr(value))}"
            raise CheckpointError(f"{where}: {stated} is not supported: minisd does {table.neutral[name]!r} only")
    if unknown:
        notes.append(f"{where}: ignored fields that nobody knows: {', '.join(map(shown, sorted(unknown)[:10]))}")
    arguments = {}
    for name, (ours, default) in table.used.items():
        value = config.get(name, default)
        arguments[ours] = default if value is None and name == "sample_size" else value
    return arguments


Config = TypeVar("Config")


def build(kind: Callable[..., Config], arguments: dict[str, Any], where: str) -> Config:
    """Make the dataclass, with every number in a possible range."""
    for name, value in arguments.items():
        if isinstance(value, list) and name in ("widths", "attention", "depths", "heads", "sample_size"):
            arguments[name] = value = tuple(value[: MAX_LEVELS + 1])
            if len(value) > MAX_LEVELS:
                raise CheckpointError(f"{where}: {name} has more than {MAX_LEVELS} levels")
        for number in value if isinstance(value, tuple) and value else (value,):
            check_number(where, name, number)
    for name in {field.name for field in fields(kind)} & {"norm_groups", "heads"}:  # type: ignore[arg-type]
        check_divides(where, arguments, name)
    return kind(**arguments)


MAX_INT = 1 << 20  # no width or vocabulary of this family comes near
MAX_LEVELS = 8  # resolutions, and resnets at each: twice what any Stable Diffusion has
MAX_LAYERS = 128  # of a text encoder: four times the largest CLIP's. The key table grows with depth
MOST = {"layers": MAX_LAYERS, "resnets_per_level": MAX_LEVELS, "depths": MAX_LAYERS}
MAY_BE_ZERO = ("projection", "added_width", "number_width")


def check_number(where: str, name: str, value: Any) -> None:
    """Sizes are small positive integers, epsilons and the scaling factor positive and finite, activations known."""
    wrong = CheckpointError(f"{where}: {name}={shown(repr(value))} is impossible")
    if name == "activation":
        if value not in ("silu", "gelu", "quick_gelu"):
            raise CheckpointError(
                f"{where}: activation {shown(repr(value))} is not supported: silu, gelu and quick_gelu are"
            )
    elif name in ("attention", "linear_projections"):
        if not isinstance(value, bool):
            raise wrong
    elif name.endswith("_eps") or name == "scaling_factor":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_INT:
            raise wrong
    elif name == "downsample_padding":
        if isinstance(value, bool) or value not in (0, 1):
            raise CheckpointError(f"{where}: downsample_padding={shown(repr(value))} is not supported: 0 and 1 are")
    elif (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not 0 <= value <= MOST.get(name, MAX_INT)
        or (not value and name not in MAY_BE_ZERO)
    ):
        raise wrong


def check_divides(where: str, arguments: dict[str, Any], name: str) -> None:
    """Norm groups split every width evenly; heads those with attention, of which the UNet's last level is one."""
    widths = arguments.get("widths", (arguments.get("width"),))
    attends = (*arguments.get("attention", ())[:-1], True) if name == "heads" else (True,) * len(widths)
    value = arguments[name]
    numbers = value if isinstance(value, tuple) else (value,) * len(widths)
    for width, number, needed in zip(widths, numbers, attends, strict=True):
        if needed and width % number:
            raise CheckpointError(f"{where}: {name}={number} does not divide the width {width}")


def read_unet(config: Mapping[str, Any], where: str, notes: list[str]) -> UNetConfig:
    """unet/config.json -> UNetConfig. A list of equal numbers counts as one."""
    arguments = read_fields(UNET, config, where, notes)
    levels = len(arguments["widths"]) if isinstance(arguments["widths"], list) else 0
    lengths = {"heads": levels, "depths": levels, "sample_size": 2}  # of lists that may differ
    for name in ("heads", "depths", "resnets_per_level", "context_width", "sample_size"):
        value = arguments[name]
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            arguments[name] = value[0]
        elif isinstance(value, list) and len(value) != lengths.get(name):
            raise CheckpointError(
                f"{where}: {name} differs between levels ({shown(value)}), which minisd does not support"
            )
    added = config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise CheckpointError(f"{where}: addition_embed_type={shown(repr(added))} is not supported: 'text_time' is")
    for name in ("added_width", "number_width"):
        arguments[name] = (added and arguments[name]) or 0
    down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"])
    up = config.get("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3)
    known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    check_levels(where, arguments["widths"], down)
    for block in down:
        if not isinstance(block, str) or block not in known:
            raise CheckpointError(f"{where}: the block type {shown(repr(block))} is not supported")
    arguments["attention"] = [known[block] for block in down]
    mirrored = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(arguments["attention"])]
    if up != mirrored:
        raise CheckpointError(f"{where}: up_block_types {shown(up)} do not mirror down_block_types {shown(down)}")
    arguments |= HARD_CODED["unet"]
    return build(UNetConfig, arguments, where)


def check_levels(where: str, widths: object, blocks: object) -> None:
    if not isinstance(widths, list | tuple) or not isinstance(blocks, list) or len(widths) != len(blocks):
        raise CheckpointError(
            f"{where}: block_out_channels {shown(widths)} and the block types {shown(blocks)} disagree"
        )


def read_vae(config: Mapping[str, Any], where: str, notes: list[str]) -> VAEConfig:
    """vae/config.json -> VAEConfig."""
    arguments = read_fields(VAE, config, where, notes)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        blocks = config.get(name, [kind])
        if not isinstance(blocks, list) or any(block != kind for block in blocks):
            raise CheckpointError(f"{where}: {name} {shown(blocks)} is not supported: a list of {kind} is")
        check_levels(where, arguments["widths"], blocks)
    arguments |= HARD_CODED["vae"]
    return build(VAEConfig, arguments, where)


def read_text_encoder(config: Mapping[str, Any], where: str, notes: list[str]) -> TextEncoderConfig:
    """text_encoder/config.json -> TextEncoderConfig: with a pooled vector only in SDXL's refiner."""
    if config.get("architectures") == ["CLIPTextModelWithProjection"]:
        return read_text_encoder_2(config, where, notes)
    return build(TextEncoderConfig, read_fields(TEXT_ENCODER, config, where, notes) | {"projection": 0}, where)


def read_text_encoder_2(config: Mapping[str, Any], where: str, notes: list[str]) -> TextEncoderConfig:
    """text_encoder_2/config.json -> TextEncoderConfig: with the pooled vector."""
    projection = {"projection": config.get("projection_dim", 512)}
    return build(TextEncoderConfig, read_fields(TEXT_ENCODER, config, where, notes) | projection, where)


READERS: dict[str, Callable[[Mapping[str, Any], str, list[str]], Any]] = {
    "unet": read_unet,
    "vae": read_vae,
    "text_encoder": read_text_encoder,
    "text_encoder_2": read_text_encoder_2,
}


def renamed(table: Fields, config: Any) -> dict[str, Any]:
    """diffusers' fields out of minisd's dataclass."""
    values = {name: getattr(config, ours) for name, (ours, _) in table.used.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def write_unet(config: UNetConfig) -> dict[str, Any]:
    """UNetConfig -> unet/config.json."""
    check_hard_coded("unet", config)
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in config.attention]
    up = ["CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in reversed(config.attention)]
    blocks = {"down_block_types": down, "up_block_types": up}
    constants = {name: UNET.neutral[name] for name in ("center_input_sample", "flip_sin_to_cos", "freq_shift")}
    numbers = renamed(UNET, config)
    for name in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"):
        numbers[name] = numbers[name] or None
    added = {"addition_embed_type": "text_time"} if config.added_width else {}
    return {"_class_name": "UNet2DConditionModel", **numbers, **blocks, **constants, **added}


def write_vae(config: VAEConfig) -> dict[str, Any]:
    """VAEConfig -> vae/config.json."""
    check_hard_coded("vae", config)
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        **renamed(VAE, config),
        "out_channels": config.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def write_text_encoder(config: TextEncoderConfig) -> dict[str, Any]:
    """TextEncoderConfig -> text_encoder/config.json."""
    start, end = config.vocabulary - 2, config.vocabulary - 1  # CLIP's two special tokens come last
    return {
        "architectures": ["CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **renamed(TEXT_ENCODER, config),
        "projection_dim": config.projection or config.width,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }


WRITERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "unet": write_unet,
    "vae": write_vae,
    "text_encoder": write_text_encoder,
    "text_encoder_2": write_text_encoder,
}
