"""Configuration and weights -> files, in either layout.

A model is written under a temporary name beside its destination and renamed when it is whole: an interrupted save
leaves nothing that looks finished, and what stood there before stays until then.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minisd.checkpoint import configs, tokenizer_files
from minisd.checkpoint.header import by_whole, is_turned
from minisd.checkpoint.hub import ALL_STEMS, GENERATION_CONFIG, single_name
from minisd.checkpoint.keymap import FAMILY, components_of, model_keys, prefixes
from minisd.checkpoint.naming import TEXT_ENCODERS
from minisd.config import END, START, ModelConfig, UNetConfig
from minisd.tokenizer import CLIPTokenizer, usual_padding

DIFFUSERS_VERSION = {"_diffusers_version": "0.35.0"}  # whose model_index.json is written
# What diffusers calls the classes of each folder, in model_index.json.
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    **DIFFUSERS_VERSION,
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


XL_INDEX = {
    **{name: value for name, value in MODEL_INDEX.items() if "safety" not in name},
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}


REFINER_INDEX = {
    **XL_INDEX,
    "_class_name": "StableDiffusionXLImg2ImgPipeline",
    "force_zeros_for_empty_prompt": False,
    "requires_aesthetics_score": True,
    "text_encoder": [None, None],
    "tokenizer": [None, None],
}


def plain(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """A tensor as a file wants it: on the CPU, densely packed, in the shape that the layout gives it."""
    return tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous().reshape(shape)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_public(path: str | os.PathLike[str]) -> None:
    """Give a file the permissions of any new file: what safetensors writes is private."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    make_public(path)


# What minisd writes into a model's folder. A folder that holds anything else is not minisd's to replace.
OWN = {*FAMILY, "model_index.json", "scheduler", "tokenizer", "tokenizer_2", GENERATION_CONFIG, "leftovers.safetensors"}


def check_replaceable(destination: Path, *, file: bool, component: bool = False) -> None:
    """Raise FileExistsError where something stands at `destination` that must not be lost.

    Replaced are a .safetensors file, an empty folder, and a folder of which minisd would have written every entry: a
    whole model or, for a `component`, one component. `file`: will a file be written, or a folder?
    """
    if destination.resolve() == Path.cwd():
        raise FileExistsError(f"{destination}: is the current folder; choose another name")
    if not os.path.lexists(destination):
        return
    if file:
        if not destination.is_file() or destination.suffix != ".safetensors":
            raise FileExistsError(f"{destination}: is there and is no .safetensors file; choose another name")
        return
    if not destination.is_dir():
        raise FileExistsError(f"{destination}: is there and is no folder; choose another name")
    names = {entry.name for entry in destination.iterdir()}
    mark = "config.json" if component else "model_index.json"
    foreign = sorted(name for name in names if not (is_weights(name) or name == mark if component else name in OWN))
    if names and (mark not in names or foreign):
        held = f"holds {foreign[0]}, which" if foreign else "is not a model that"
        raise FileExistsError(f"{destination}: {held} minisd did not write; choose another name")


def is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def into_place(destination: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder under a temporary name, then rename it to `destination`."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name[:40]}-", dir=destination.parent))
    except OSError as error:
        raise type(error)(f"{destination}: cannot be written: {error.strerror}") from None
    try:
        new, old = scratch / "new", scratch / "old"
        write(new)
        if destination.is_dir():  # a folder cannot be replaced in one step: move it aside, and back if need be
            destination.rename(old)
        try:
            os.replace(new, destination)
        except BaseException:
            if old.exists():
                old.rename(destination)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class Model:
    """All that a saved model consists of. `states`: a state dict under minisd's names for each component."""

    states: Mapping[str, Mapping[str, Tensor]]
    config: ModelConfig
    tokenizer: CLIPTokenizer
    generation: Mapping[str, Any]


def save(model: Model, path: str | os.PathLike[str], *, layout: str, dtype: torch.dtype | None) -> None:
    """Write a model. `layout`: "diffusers" (a folder) or "compvis" (one file). `dtype=None` keeps each tensor's own.

    Raises ValueError for an unknown layout or a dtype that is not floating point, FileExistsError where `path` is
    taken by something that is not a model.
    """
    destination = Path(os.path.expanduser(path))
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: weights are floating point")
    if layout == "diffusers":
        check_replaceable(destination, file=False)
        into_place(destination, lambda folder: write_folder(model, folder, dtype))
    elif layout == "compvis":
        check_replaceable(destination, file=True)
        into_place(destination, lambda file: write_single_file(model, file, dtype, destination.stem))
    else:
        raise ValueError(f"layout={layout!r}: must be 'diffusers' or 'compvis'")


def write_folder(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    """diffusers' layout: a folder with a config.json and a safetensors file for each component."""
    for component, keys in model_keys(model.config).items():
        state = model.states[component]
        tensors = {key.diffusers: plain(state[key.minisd], key.shape, dtype) for key in keys}
        path = folder / folder_of(component, model.config) / single_name(ALL_STEMS[component], "")
        path.parent.mkdir(parents=True)
        write_tensors(path, tensors, {})
    write_settings(folder, model.config, model.tokenizer, model.generation)


def write_settings(folder: Path, config: ModelConfig, tokenizer: CLIPTokenizer, generation: Mapping[str, Any]) -> None:
    """What a folder in diffusers' layout holds beside the weights."""
    for component in components_of(config):
        stored = configs.WRITERS[component](getattr(config, component))
        if component in TEXT_ENCODERS:  # added tokens may stand behind the two special tokens
            padding = "!" if component == "text_encoder_2" else tokenizer.pad_token
            ends = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": padding}
            stored |= {name: tokenizer.vocabulary[token] for name, token in ends.items()}
        write_json(folder / folder_of(component, config) / "config.json", stored)
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **config.scheduler})
    words = folder_of("text_encoder", config).replace("text_encoder", "tokenizer")
    tokenizer_files.write_folder(tokenizer, folder / words)
    if config.text_encoder_2:
        second = tokenizer.padded_with(usual_padding(config.text_encoder_2))
        tokenizer_files.write_folder(second, folder / "tokenizer_2")
    if generation:
        write_json(folder / GENERATION_CONFIG, generation)
    index = REFINER_INDEX if is_refiner(config) else XL_INDEX if config.text_encoder_2 else MODEL_INDEX
    write_json(folder / "model_index.json", index)


def is_refiner(config: ModelConfig) -> bool:
    """Whether it is SDXL's refiner, whose only text encoder is the second of the base model."""
    return config.text_encoder.projection > 0


def folder_of(component: str, config: ModelConfig) -> str:
    return "text_encoder_2" if component == "text_encoder" and is_refiner(config) else component


def write_single_file(model: Model, file: Path, dtype: torch.dtype | None, title: str) -> None:
    """CompVis' layout: one file."""
    prefix = prefixes(vars(model.config))
    tensors = {
        prefix[component] + key.compvis: plain(model.states[component][key.minisd], key.compvis_shape, dtype)
        for component, keys in model_keys(model.config).items()
        for key in keys
    }
    settings = settings_as_metadata(model.config, model.tokenizer, model.generation)
    write_tensors(file, fused(tensors), modelspec_of(model.config, title) | settings)


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, the thirds of one tensor (OpenCLIP's queries, keys and values) concatenated, its projection turned."""
    turned = {name: tensor.T.contiguous() if is_turned(name) else tensor for name, tensor in tensors.items()}
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in by_whole(turned).items()}


def settings_as_metadata(
    config: ModelConfig, tokenizer: CLIPTokenizer, generation: Mapping[str, Any]
) -> dict[str, str]:
    """What the shapes in a single file cannot tell: heads, norm groups, schedule, vocabulary."""
    stored = {name: configs.WRITERS[name](getattr(config, name)) for name in components_of(config)}
    stored["scheduler"] = dict(config.scheduler)
    metadata = {"minisd.config": json.dumps(stored)}
    usual = CLIPTokenizer.clip(usual_padding(config.text_encoder))
    if (tokenizer.vocabulary, tokenizer.pad_token) != (usual.vocabulary, usual.pad_token):
        metadata["minisd.tokenizer"] = tokenizer_files.to_json(tokenizer)
    if generation:
        metadata["minisd.generation"] = json.dumps(dict(generation))
    return metadata


REFINER_WIDTH = 1280  # of the text that the UNet of SDXL's refiner attends to; the base model's is 2048


def modelspec(title: str, prediction: str, unet: UNetConfig, downsampling: int, kind: str = "") -> dict[str, str]:
    """The metadata by which other programs recognise a model (https://github.com/Stability-AI/ModelSpec).

    `prediction`: diffusers' prediction_type; `downsampling`: pixels a latent; `kind`: "/lora" for a LoRA. There is no
    date: the same model written twice is the same file.
    """
    v2 = f"v2-{'768-v' if prediction == 'v_prediction' else '512'}"
    xl = "xl-v1-refiner" if unet.context_width == REFINER_WIDTH else "xl-v1-base"
    family = xl if unet.added_width else v2 if unet.linear_projections else "v1"
    height, width = (side * downsampling for side in unet.own_size)
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-{family}{kind}",
        "modelspec.implementation": "https://github.com/CompVis/ldm",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction,
        "modelspec.resolution": f"{width}x{height}",
    }


def modelspec_of(config: ModelConfig, title: str) -> dict[str, str]:
    """`modelspec` of a whole model."""
    prediction = str(config.scheduler.get("prediction_type", "epsilon"))
    return modelspec(title, prediction, config.unet, config.vae.downsampling)
