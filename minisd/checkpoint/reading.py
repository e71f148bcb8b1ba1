"""Files -> configuration and weights.

Headers are read first and everything is decided from them; values come last, memory-mapped and one tensor at a time,
so that loading makes no second copy of the weights. Reading is strict: every weight of the model is filled exactly
once, and every other tensor of a model's files is in a known class of leftovers or an error.
"""

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisd.checkpoint import configs
from minisd.checkpoint.errors import CheckpointError
from minisd.checkpoint.files import Files, open_component_folder, open_files, shard_paths
from minisd.checkpoint.hub import GENERATION_CONFIG, resolve
from minisd.checkpoint.keymap import COMPONENTS, KEYS
from minisd.checkpoint.naming import (
    INFER,
    TITLES,
    Match,
    Naming,
    Problems,
    ignorable,
    match,
    namings,
    stranger,
    way_out,
)
from minisd.checkpoint.textfiles import read_json_object
from minisd.checkpoint.values import Values, read_tensor
from minisd.config import SD15, ModelConfig
from minisd.schedulers import DDIMScheduler


@dataclass(frozen=True)
class Component:
    """A component, understood but not yet read."""

    config: Any
    files: Files
    match: Match


@dataclass
class Checkpoint:
    """A whole model, understood but not yet read. `notes` are sentences that a person should see."""

    path: Path
    components: dict[str, Component]
    scheduler: Mapping[str, Any]
    tokenizer: Path | str | None  # a folder, or the text that `sd.save` put into a file's metadata; None: CLIP's
    notes: list[str] = field(default_factory=list)
    generation: Mapping[str, Any] = field(default_factory=dict)  # recommended settings: steps, guidance_scale

    @property
    def config(self) -> ModelConfig:
        parts = {name: component.config for name, component in self.components.items()}
        return ModelConfig(**parts, scheduler=self.scheduler)


def fit(component: str, config: Any, files: Files, naming: Naming, problems: Problems) -> Component:
    """Match a component's keys against the file."""
    return Component(config, files, match(list(KEYS[component](config)), files.tensors, naming, problems))


def leftovers(files: Files, components: list[Component], problems: Problems, spare: Naming | None = None) -> None:
    """Every tensor of the file that no component uses must be in a class that can be ignored.

    `spare` names a second set of UNet weights, raw or averaged, of which the other one was chosen.
    """
    known = set().union(*(component.match.used for component in components))
    known |= {name for name, _, _ in problems.shape} | {name for name, _ in problems.dtype}
    known |= {name for scale, _, weight in problems.scale for name in (scale, weight)}
    for component in components:
        if spare is not None and component.match.naming.component == "unet":
            known |= {name for key in KEYS["unet"](component.config) for name in spare.names(key)}
    problems.unexpected += [name for name in files.tensors if name not in known and ignorable(name) is None]


def open_folder(path: Path, *, half: bool, weights: str, skip: tuple[str, ...]) -> Checkpoint:
    """A folder in diffusers' layout."""
    notes: list[str] = []
    components = {}
    for name in COMPONENTS:
        folder = path / name
        if name in skip:
            continue
        if not folder.is_dir():
            hint = " (give a VAE with vae=)" if name == "vae" else ""
            raise CheckpointError(f"{path}: is not a model in diffusers' layout: it has no folder {name}/{hint}")
        components[name] = open_component(folder, name, half=half, weights=weights, notes=notes)
    scheduler = path / "scheduler" / "scheduler_config.json"
    settings = read_scheduler(scheduler) if scheduler.exists() else dict(SD15.scheduler)
    if not (path / "tokenizer").is_dir():
        raise CheckpointError(f"{path}: has no folder tokenizer/")
    recommended = path / GENERATION_CONFIG
    generation = read_json_object(recommended) if recommended.exists() else {}
    return Checkpoint(path, components, settings, path / "tokenizer", notes, generation)


def read_scheduler(path: Path) -> dict[str, Any]:
    """scheduler_config.json: a noise schedule that DDIM can follow, whichever scheduler wrote it."""
    settings = checked_schedule(read_json_object(path), str(path))
    # diffusers' pipeline forces these two on whatever schedule it is given, and pictures depend on them.
    return settings | {"clip_sample": False, "steps_offset": 1}


def checked_schedule(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a noise schedule. Raises CheckpointError for values that are impossible."""
    settings = {name: value for name, value in stored.items() if not name.startswith("_")}
    try:
        DDIMScheduler.from_config({"num_train_timesteps": 1000} | settings)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    return settings


def open_component(folder: Path, name: str, *, half: bool, weights: str, notes: list[str]) -> Component:
    """One folder of diffusers' layout: its config.json and its weights."""
    config = configs.READERS[name](read_json_object(folder / "config.json"), str(folder / "config.json"), notes)
    files = open_component_folder(folder, name, half=half, weights=weights)
    found = namings(name, files.tensors).get("raw")
    if found is None:
        raise CheckpointError(f"{files.path}: does not hold a {TITLES[name]}{described(files)}")
    problems = Problems()
    component = fit(name, config, files, found, problems)
    leftovers(files, [component], problems)
    problems.raise_for(str(files.path))
    note_position_ids(files, notes)
    return component


def described(files: Files) -> str:
    """ ": it is ..." where that can be said."""
    other = stranger(files.tensors)
    if other:
        return f": it is {other}"
    found = [TITLES[name] for name in COMPONENTS if namings(name, files.tensors)]
    return f": it holds {' and '.join(found)}" if found else f": its names begin with {sorted(files.tensors)[:3]}"


def choose_unet(found: dict[str, Naming], files: Files, weights: str, notes: list[str]) -> Naming:
    """Raw or averaged (EMA) weights, where a file has both."""
    if weights == "auto":
        if len(found) == 2:
            notes.append(
                f"{files.path}: holds raw and averaged (EMA) UNet weights; the raw ones are used (weights=...)"
            )
        return found.get("raw") or found["ema"]
    if weights not in found:
        raise CheckpointError(f"{files.path}: has no {weights} UNet weights")
    return found[weights]


def stored_json(files: Files, name: str) -> dict[str, Any] | None:
    """A JSON object in a file's metadata, or None."""
    try:
        stored = json.loads(files.metadata.get(name, "null"))
    except (ValueError, RecursionError):
        stored = False
    if stored is not None and not isinstance(stored, dict):
        raise CheckpointError(f"{files.path}: its metadata holds a broken {name}")
    return stored


def stored_component(files: Files, name: str) -> Any:
    """A component's configuration that minisd wrote into the file's metadata; None where it did not."""
    stored = (stored_json(files, "minisd.config") or {}).get(name)
    if stored is None:
        return None
    try:
        return configs.READERS[name](stored, f"{files.path} (metadata)", [])
    except (TypeError, AttributeError):
        raise CheckpointError(f"{files.path}: its metadata holds a broken minisd.config") from None


def stored_schedule(files: Files) -> dict[str, Any]:
    """The noise schedule in a file's metadata; SD 1.5's where there is none."""
    stored = (stored_json(files, "minisd.config") or {}).get("scheduler")
    if stored is None:
        return dict(SD15.scheduler)
    if not isinstance(stored, dict):
        raise CheckpointError(f"{files.path}: its metadata holds a broken minisd.config")
    return checked_schedule(stored, f"{files.path} (metadata)")


def files_at(path: Path) -> Files:
    """One file, or the shards that an index names."""
    return open_files(shard_paths(path) if path.suffix == ".json" else [path], path)


def open_single_file(path: Path, *, weights: str, skip: tuple[str, ...]) -> Checkpoint:
    """A single file, whatever its dialect."""
    files = files_at(path)
    notes: list[str] = []
    found = {name: namings(name, files.tensors) for name in COMPONENTS}
    present = [TITLES[name] for name in COMPONENTS if found[name]]
    other = stranger(files.tensors)
    if other:
        raise CheckpointError(f"{path}: is {other}; {way_out(other)}")
    if not present:
        names = ", ".join(sorted(files.tensors)[:3])
        raise CheckpointError(f"{path}: is not a Stable Diffusion model (its tensors: {names or 'none'} ...)")
    missing = [name for name in COMPONENTS if not found[name] and name not in skip]
    if missing:
        hint = "; give a VAE with vae=" if missing == ["vae"] else ""
        if present == ["VAE"]:
            hint = "; give it with vae= beside a model"
        only = f"holds a {' and a '.join(present)} only"
        raise CheckpointError(f"{path}: {only}: no {' and no '.join(TITLES[n] for n in missing)}{hint}")
    problems = Problems()
    components = {}
    for name in COMPONENTS:
        if not found[name]:
            continue
        naming = choose_unet(found[name], files, weights, notes) if name == "unet" else found[name]["raw"]
        config = stored_component(files, name) or infer(name, files, naming)
        components[name] = fit(name, config, files, naming, problems)
    spare = next((other for other in found["unet"].values() if other != components["unet"].match.naming), None)
    leftovers(files, list(components.values()), problems, spare)
    problems.raise_for(str(path))
    note_position_ids(files, notes)
    scheduler = stored_schedule(files) | prediction_hints(files.tensors)
    generation = stored_json(files, "minisd.generation") or {}
    return Checkpoint(path, components, scheduler, files.metadata.get("minisd.tokenizer"), notes, generation)


def infer(component: str, files: Files, naming: Naming) -> Any:
    try:
        config = INFER[component](files.tensors, naming)
        return configs.build(type(config), vars(config).copy(), f"{files.path}: {TITLES[component]} shapes")
    except CheckpointError as error:
        message = str(error)
        raise CheckpointError(message if str(files.path) in message else f"{files.path}: {message}") from None


def prediction_hints(names: Collection[str]) -> dict[str, Any]:
    """v-prediction and zero terminal SNR, which some files tell by a tensor of that name."""
    hints: dict[str, Any] = {}
    if "v_pred" in names:
        hints["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        hints |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return hints


def note_position_ids(files: Files, notes: list[str]) -> None:
    """The text encoder's positions are 0, 1, 2, ...; a file that says otherwise was damaged by a merge."""
    for name in files.tensors:
        if name.endswith("embeddings.position_ids"):
            ids = read_tensor(files, name).flatten().float()
            if not torch.equal(ids, torch.arange(len(ids)).float()):
                notes.append(f"{files.path}: {name} is damaged; minisd and diffusers do not use it, some programs do")


def open_vae(source: str | os.PathLike[str], *, half: bool, notes: list[str]) -> Component:
    """A VAE of its own: a folder, a VAE file with or without prefix, or the VAE of a whole checkpoint."""
    return open_alone(source, "vae", half=half, notes=notes)


def open_alone(
    source: str | os.PathLike[str],
    name: str,
    *,
    half: bool = False,
    weights: str = "auto",
    notes: list[str] | None = None,
) -> Component:
    """One component: of its folder, of a file that holds it alone, or of a whole checkpoint."""
    notes = [] if notes is None else notes
    path = resolve(source, half=half, component=name)
    if path.is_dir():
        folder = path / name if (path / name).is_dir() else path
        return open_component(folder, name, half=half, weights=weights, notes=notes)
    files = files_at(path)
    found = namings(name, files.tensors)
    if not found:
        raise CheckpointError(f"{path}: does not hold a {TITLES[name]}{described(files)}")
    naming = choose_unet(found, files, weights, notes) if name == "unet" else found["raw"]
    problems = Problems()
    config = stored_component(files, name) or infer(name, files, naming)
    component = fit(name, config, files, naming, problems)
    problems.raise_for(str(path))
    return component


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None,
    weights: str = "auto",
    vae: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Understand `source` (see `sources.py`) from its headers. `dtype` decides which variant of a file is taken.

    Raises FileNotFoundError for a path that is not there and CheckpointError for anything that cannot be loaded.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype}: must be a floating-point torch.dtype, or None for the file's own")
    if weights not in ("auto", "ema", "raw"):
        raise ValueError(f"weights={weights!r}: must be 'auto', 'ema' or 'raw'")
    half = dtype in (torch.float16, torch.bfloat16)
    path = resolve(source, half=half, weights=weights)
    skip = ("vae",) if vae is not None else ()
    if path.is_dir():
        checkpoint = open_folder(path, half=half, weights=weights, skip=skip)
    else:
        checkpoint = open_single_file(path, weights=weights, skip=skip)
    if vae is not None:
        checkpoint.components["vae"] = open_vae(vae, half=half, notes=checkpoint.notes)
    check_fit(checkpoint)
    return checkpoint


def check_fit(checkpoint: Checkpoint) -> None:
    """The three components must agree on the widths where they meet."""
    config = checkpoint.config
    if config.unet.context_width != config.text_encoder.width:
        raise CheckpointError(
            f"{checkpoint.path}: the UNet expects text of width {config.unet.context_width}, "
            f"the text encoder gives {config.text_encoder.width}"
        )
    if config.unet.out_channels != config.vae.latent_channels:
        raise CheckpointError(
            f"{checkpoint.path}: the UNet makes {config.unet.out_channels} latent channels, "
            f"the VAE has {config.vae.latent_channels}"
        )


def read_state(component: Component, *, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """A component's state dict under minisd's names: memory-mapped where nothing has to be converted.

    `dtype=None` keeps the dtype that most of the component's tensors have; 8-bit floats become float32.
    """
    values = Values(component.files, component.match)
    if dtype is None:
        dtype = Counter(values.dtype(name) for name in values).most_common(1)[0][0]
    return {name: values[name].to(device=device, dtype=dtype) for name in values}
