"""The pixel-space UNet in files: diffusers' folder of a `UNet2DModel`, and that of a pipeline with a scheduler beside.

The same readers as for Stable Diffusion (`minisd.checkpoint`), with this UNet's table of names and its config.json.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisd.checkpoint.configs import MAX_INT, MAX_LEVELS, Fields, check_number, read_fields
from minisd.checkpoint.hub import GENERATION_CONFIG, STEMS, resolve, single_name
from minisd.checkpoint.naming import Naming, Problems, match
from minisd.checkpoint.save import DIFFUSERS_VERSION, check_replaceable, into_place, plain, write_json, write_tensors
from minisd.checkpoint.survey import Part, open_component_folder
from minisd.files import CheckpointError, read_json_object, shown
from minisd.pixel.config import PixelUNetConfig
from minisd.pixel.keys import pixel_unet_keys

FIELDS = Fields(
    used={
        "sample_size": ("sample_size", None),
        "in_channels": ("in_channels", 3),
        "out_channels": ("out_channels", 3),
        "center_input_sample": ("center_input", False),
        "block_out_channels": ("widths", [224, 448, 672, 896]),
        "down_block_types": ("down_attention", ["DownBlock2D"] + ["AttnDownBlock2D"] * 3),
        "up_block_types": ("up_attention", ["AttnUpBlock2D"] * 3 + ["UpBlock2D"]),
        "layers_per_block": ("resnets_per_level", 2),
        "mid_block_type": ("middle", "UNetMidBlock2D"),
        "add_attention": ("middle_attention", True),
        "mid_block_scale_factor": ("middle_scale", 1),
        "attn_norm_num_groups": ("middle_attention_groups", None),
        "attention_head_dim": ("head_width", 8),
        "time_embedding_dim": ("time_width", None),
        "flip_sin_to_cos": ("cosines_first", True),
        "freq_shift": ("frequency_shift", 0),
        "resnet_time_scale_shift": ("scale_shift", "default"),
        "class_embed_type": ("class_embedding", None),
        "num_class_embeds": ("classes", None),
        "act_fn": ("activation", "silu"),
        "dropout": ("dropout", 0.0),
        "downsample_type": ("downsample", "conv"),
        "upsample_type": ("upsample", "conv"),
        "downsample_padding": ("downsample_padding", 1),
        "norm_num_groups": ("norm_groups", 32),
        "norm_eps": ("norm_eps", 1e-5),
    },
    neutral={"time_embedding_type": "positional"},
    silent=frozenset({"num_train_timesteps"}),  # the rows of a learned time embedding
)

# minisd's name -> diffusers' word for each value it may have.
WORDS: dict[str, dict[Any, Any]] = {
    "middle": {"UNetMidBlock2D": True, None: False},
    "scale_shift": {"default": False, "scale_shift": True},
    "class_embedding": {None: None, "timestep": "timestep", "identity": "identity"},
    "downsample": {"conv": "conv", "resnet": "resnet"},
    "upsample": {"conv": "conv", "resnet": "resnet"},
    **{name: {True: True, False: False} for name in ("center_input", "middle_attention", "cosines_first")},
}
BLOCKS = {
    "down_attention": {"DownBlock2D": False, "AttnDownBlock2D": True},
    "up_attention": {"UpBlock2D": False, "AttnUpBlock2D": True},
}


def read_config(config: Mapping[str, Any], where: str, notes: list[str]) -> PixelUNetConfig:
    """A `UNet2DModel`'s config.json -> PixelUNetConfig. Raises CheckpointError for what minisd does not do."""
    made = read_fields(FIELDS, config, where, notes)
    for name, words in WORDS.items():
        made[name] = said(where, name, made[name], words)
    made["widths"] = listed(where, "widths", made["widths"])
    for name, words in BLOCKS.items():
        made[name] = tuple(said(where, name, block, words) for block in listed(where, name, made[name]))
        if len(made[name]) != len(made["widths"]):
            raise CheckpointError(f"{where}: {len(made[name])} block types for {len(made['widths'])} widths")
    size = made["sample_size"]
    if size is not None:
        made["sample_size"] = listed(where, "sample_size", size, 2) if isinstance(size, list | tuple) else (size, size)
    if made["class_embedding"] is None and made["classes"] is not None:
        made["class_embedding"] = "table"
    check_sizes(where, made)
    made["time_width"] = made["time_width"] or 4 * made["widths"][0]
    if made["middle_attention_groups"] is None and not made["scale_shift"]:
        made["middle_attention_groups"] = made["norm_groups"]
    check_divisions(where, made)
    return PixelUNetConfig(**made)


def said(where: str, name: str, value: Any, words: Mapping[Any, Any]) -> Any:
    if not isinstance(value, str | bool | None) or value not in words:
        raise CheckpointError(
            f"{where}: {name}: {shown(repr(value))} is not supported: {' and '.join(map(repr, words))} are"
        )
    return words[value]


def listed(where: str, name: str, value: Any, count: int | None = None) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or not value or len(value) > MAX_LEVELS or count not in (None, len(value)):
        raise CheckpointError(f"{where}: {name}={shown(repr(value))} is impossible")
    return tuple(value)


OPTIONAL = ("middle_attention_groups", "head_width", "time_width", "classes")
COUNTS = ("in_channels", "out_channels", "resnets_per_level", "norm_groups", *OPTIONAL)
SHARES = {"dropout": (0, 1), "frequency_shift": (0, 1), "middle_scale": (1e-6, MAX_INT)}


def check_sizes(where: str, made: Mapping[str, Any]) -> None:
    """Raise CheckpointError for sizes and factors that no network has."""
    numbers = [(name, made[name]) for name in COUNTS if not (made[name] is None and name in OPTIONAL)]
    numbers += [("widths", width) for width in made["widths"]]
    numbers += [("sample_size", size) for size in made["sample_size"] or ()]
    numbers += [(name, made[name]) for name in ("activation", "downsample_padding", "norm_eps")]
    for name, value in numbers:
        check_number(where, name, value)
    for name, (low, high) in SHARES.items():
        value = made[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise CheckpointError(f"{where}: {name}={shown(repr(value))} is impossible")


def check_divisions(where: str, made: Mapping[str, Any]) -> None:
    """Raise CheckpointError where norm groups or heads do not divide a width that they split."""
    levels = list(zip(made["widths"], made["down_attention"], reversed(made["up_attention"]), strict=True))
    splits = [(width, made["norm_groups"], "norm_groups") for width in made["widths"]]
    heads = [width for width, down, up in levels if down or up]
    if made["middle"] and made["middle_attention"]:
        heads.append(made["widths"][-1])
        splits.append((made["widths"][-1], made["middle_attention_groups"] or 1, "middle_attention_groups"))
    splits += [(width, min(made["head_width"] or width, width), "head_width") for width in heads]
    for width, number, name in splits:
        if width % number:
            raise CheckpointError(f"{where}: {name}={number} does not divide the width {width}")


def write_config(config: PixelUNetConfig) -> dict[str, Any]:
    """PixelUNetConfig -> a `UNet2DModel`'s config.json."""
    stored: dict[str, Any] = {"_class_name": "UNet2DModel", "time_embedding_type": "positional"}
    for name, (ours, _) in FIELDS.used.items():
        value = getattr(config, ours)
        if ours in BLOCKS:
            value = [next(word for word, attends in BLOCKS[ours].items() if attends == one) for one in value]
        elif ours in WORDS:
            value = next((word for word, means in WORDS[ours].items() if means == value), None)
        stored[name] = list(value) if isinstance(value, tuple) else value
    if config.sample_size is not None and config.sample_size[0] == config.sample_size[1]:
        stored["sample_size"] = config.sample_size[0]
    if config.time_width == 4 * config.widths[0]:
        stored["time_embedding_dim"] = None
    if not config.scale_shift and config.middle_attention_groups == config.norm_groups:
        stored["attn_norm_num_groups"] = None
    return stored


# ------------------------------------------------ folders


def open_unet(folder: Path, *, half: bool = False) -> Part:
    """The UNet in a folder with config.json and weights, understood but not yet read. Raises CheckpointError.

    Its tensors have diffusers' names, today's or those of the first files, or CompVis'.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder with a UNet2DModel")
    path, notes, problems = folder / "config.json", list[str](), Problems()
    stated = read_json_object(path)
    if stated.get("_class_name", "UNet2DModel") not in ("UNet2DModel", "UNetUnconditionalModel"):
        raise CheckpointError(f"{path}: is a {shown(stated['_class_name'])}, not a UNet2DModel")
    config = read_config(stated, str(path), notes)
    files = open_component_folder(folder, "unet", half=half, weights="auto")
    keys = list(pixel_unet_keys(config))
    compvis = "temb.dense.0.weight" in files.tensors
    found = match(keys, files.tensors, Naming("unet", "compvis" if compvis else "diffusers", ""), problems)
    problems.unexpected += sorted(files.tensors.keys() - found.used - problems.names)
    problems.raise_for(str(files.path))
    return Part("unet", config, keys, found, problems, files, None, tuple(notes))


def find_unet(source: str | os.PathLike[str], *, half: bool = False) -> tuple[Path, Path]:
    """The folder that `source` names (see `hub.resolve`), and the UNet's folder: in it, or itself."""
    folder = resolve(source, half=half, component="unet")
    return folder, folder / "unet" if (folder / "unet").is_dir() else folder


def write_unet(folder: Path, state: Mapping[str, Tensor], config: PixelUNetConfig, dtype: torch.dtype | None) -> None:
    """Write config.json and the weights, under diffusers' names."""
    tensors = {key.diffusers: plain(state[key.minisd], key.shape, dtype) for key in pixel_unet_keys(config)}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / single_name(STEMS["unet"], ""), tensors, {})
    write_json(folder / "config.json", write_config(config))


def save_folder(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    config: PixelUNetConfig,
    scheduler: Mapping[str, Any],
    generation: Mapping[str, Any],
    dtype: torch.dtype | None,
) -> None:
    """Write a folder that diffusers' pipelines load, whole or not at all. `scheduler` says its `_class_name`."""
    destination = Path(os.path.expanduser(path))
    check_replaceable(destination, file=False)
    kind = str(scheduler["_class_name"])
    index = {
        "_class_name": kind.replace("Scheduler", "Pipeline"),
        **DIFFUSERS_VERSION,
        "scheduler": ["diffusers", kind],
        "unet": ["diffusers", "UNet2DModel"],
    }

    def write(folder: Path) -> None:
        write_unet(folder / "unet", state, config, dtype)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        if generation:
            write_json(folder / GENERATION_CONFIG, generation)
        write_json(folder / "model_index.json", index)

    into_place(destination, write)
