"""What a file or folder is: the one understanding of it, from headers and small files, without reading a weight.

    found = survey("model.safetensors")
    found.parts["unet"].config, found.schedule.settings, found.notes, found.problem()

`minisd inspect` prints it; `load.py`, conversion, comparison and merging obey it, so that they cannot disagree.
Everything that is understood is here, also of a file that cannot be loaded: `problem` says why, and `whole` raises it.
This file needs the standard library only. Next: `load.py`.
"""

import json
import os
import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from minisd.checkpoint import configs, schedule, tokenizer_files
from minisd.checkpoint.header import WAY_OUT, Files, TensorInfo, open_files, shard_paths
from minisd.checkpoint.hub import ALL_STEMS, GENERATION_CONFIG, index_name, resolve, single_name, variant_of
from minisd.checkpoint.infer import INFER
from minisd.checkpoint.keymap import COMPONENTS, FAMILY, KEYS, Key
from minisd.checkpoint.naming import (
    OPENCLIP_MARK,
    TEXT_ENCODERS,
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
from minisd.checkpoint.schedule import OURS, Schedule
from minisd.checkpoint.tokenizer_files import TokenizerData
from minisd.config import SD15, TextEncoderConfig
from minisd.files import CheckpointError, read_json_object, shown

AVERAGED = "unet (averaged)"  # the title of a UNet's moving average (EMA) beside or instead of the raw weights
SCHEDULER_CONFIG = Path("scheduler") / "scheduler_config.json"
WEIGHTS = ("auto", "ema", "raw")


@dataclass(frozen=True)
class Part:
    """One component under one set of names. A UNet that is there twice, raw and averaged (EMA), is two parts."""

    component: str
    config: Any
    keys: list[Key]
    match: Match
    problems: Problems  # what is missing or misshapen
    files: Files
    flaw: str | None  # why its configuration cannot be used, as an error says it
    notes: tuple[str, ...]

    @property
    def title(self) -> str:
        return AVERAGED if self.match.naming.column == "ema" else self.component

    @property
    def sources(self) -> dict[str, str]:
        """minisd's name -> the file's."""
        return {ours: name for ours, (name, _) in self.match.sources.items()}

    @property
    def infos(self) -> list[TensorInfo]:
        return [self.files.tensors[name] for name in self.sources.values()]

    @property
    def missing(self) -> list[str]:
        """In the file's own naming."""
        return [name for name, _ in self.problems.missing]

    @property
    def misshapen(self) -> list[str]:
        return [f"{name} is {list(got)}, not {list(want)}" for name, got, want in self.problems.shape]

    @property
    def complete(self) -> bool:
        return not self.missing and not self.misshapen

    @property
    def dtypes(self) -> dict[str, int]:
        """How many weights have each dtype, the most frequent first."""
        return dict(Counter(info.dtype for info in self.infos).most_common())

    @property
    def parameters(self) -> int:
        return sum(prod(info.shape) for info in self.infos)

    @property
    def bytes(self) -> int:
        return sum(info.end - info.start for info in self.infos)


@dataclass(frozen=True)
class Survey:
    """Everything that a source tells. Titles are components, and AVERAGED."""

    path: Path
    sets: dict[str, Files]  # component -> its folder's weights; "" -> those without a folder of their own
    parts: dict[str, Part]  # by title
    other: str | None  # what it is, if it is no Stable Diffusion
    schedule: Schedule
    generation: dict[str, Any]  # recommended settings: steps, guidance_scale
    notes: tuple[str, ...]  # sentences that a person should see
    flaws: tuple[str, ...]  # of the small files: why they cannot be used

    @property
    def layout(self) -> str:
        """ "diffusers" for a model's folder, else "file" (or the folder of one component)."""
        return "file" if "" in self.sets else "diffusers"

    def chosen(self, weights: str = "auto") -> dict[str, Part]:
        """The components, the UNet's raw or averaged weights as `weights` says: whole or not."""
        parts = {name: self.parts[name] for name in FAMILY if name in self.parts}
        if weights == "ema" and self.layout == "diffusers":  # there, variants of the files stand for it
            return parts
        if AVERAGED in self.parts and (weights == "ema" or (weights == "auto" and "unet" not in parts)):
            return {"unet": self.parts[AVERAGED]} | {name: part for name, part in parts.items() if name != "unet"}
        unets = {"raw": "unet", "ema": AVERAGED}
        if weights != "auto" and {"unet", AVERAGED} & self.parts.keys() and unets[weights] not in self.parts:
            raise CheckpointError(f"{self.path}: has no {weights} UNet weights")
        return parts

    def whole(self, weights: str = "auto", elsewhere: Collection[str] = ()) -> dict[str, Part]:
        """The components of a model, complete, but for those that come from `elsewhere`.

        Raises CheckpointError with everything that is wrong.
        """
        self.check_family()
        self.check_present(elsewhere)
        parts = {name: part for name, part in self.chosen(weights).items() if name not in elsewhere}
        for part in parts.values():
            if part.flaw:
                raise CheckpointError(part.flaw)
        for place, files in self.sets.items():
            if place not in elsewhere:
                self.check_complete(files, [part for part in parts.values() if part.files is files])
        for flaw in self.flaws:
            raise CheckpointError(flaw)
        return parts

    def check_family(self) -> None:
        """Raise CheckpointError for another kind of model, and for none at all."""
        if self.other:
            raise CheckpointError(f"{self.path}: is {self.other}; {way_out(self.other)}")
        if not self.parts and self.layout == "file":
            names = ", ".join(shown(name, 60) for files in self.sets.values() for name in sorted(files.tensors)[:3])
            raise CheckpointError(f"{self.path}: is not a Stable Diffusion model (its tensors: {names or 'none'} ...)")

    def check_present(self, elsewhere: Collection[str]) -> None:
        """Raise CheckpointError where a component is not there."""
        present = {part.component for part in self.parts.values()}
        absent = [name for name in COMPONENTS if name not in present and name not in elsewhere]
        if self.layout == "file" and absent:
            hint = "; give a VAE with vae=" if absent == ["vae"] else ""
            if present == {"vae"}:
                hint = "; give it with vae= beside a model"
            only = " and a ".join(TITLES[name] for name in COMPONENTS if name in present)
            without = " and no ".join(TITLES[name] for name in absent)
            raise CheckpointError(f"{self.path}: holds a {only} only: no {without}{hint}")
        for name in absent:
            if name in self.sets:
                files = self.sets[name]
                raise CheckpointError(f"{files.path}: does not hold a {TITLES[name]}{described(files)}")
            hint = " (give a VAE with vae=)" if name == "vae" else ""
            raise CheckpointError(f"{self.path}: is not a model in diffusers' layout: it has no folder {name}/{hint}")

    def check_complete(self, files: Files, parts: Iterable[Part]) -> None:
        """Raise CheckpointError where a weight is missing, and where nobody knows what a tensor is."""
        problems = Problems()
        for part in parts:
            problems.add(part.problems)
        known = {name for part in self.parts.values() for name in part.match.used | part.problems.names}
        problems.unexpected += [name for name in files.tensors if name not in known and ignorable(name) is None]
        problems.raise_for(str(files.path))

    def tokenizer(self) -> TokenizerData | None:
        """The model's own tokenizer; None where there is none, which means CLIP's. Raises CheckpointError."""
        if self.layout == "diffusers":
            names = [name for name in ("tokenizer", "tokenizer_2") if (self.path / name).is_dir()]
            if not names:
                raise CheckpointError(f"{self.path}: has no folder tokenizer/")
            return tokenizer_files.read_folder(self.path / names[0])
        text = self.sets[""].metadata.get("minisd.tokenizer")
        return None if text is None else tokenizer_files.from_json(text, self.path)

    def problem(self) -> str | None:
        """Why minisd would not load it, in one line; None if it would."""
        try:
            parts = self.whole()
            check_fit(self.path, {name: part.config for name, part in parts.items()})
            if (own := self.tokenizer()) is not None:
                check_tokenizer(self.path, own, parts["text_encoder"].config)
        except CheckpointError as error:
            return "; ".join(line.strip() for line in str(error).splitlines())
        return None


def survey(
    source: str | os.PathLike[str],
    *,
    half: bool = False,
    weights: str = "auto",
    prediction: str | None = None,
    only: str | None = None,
) -> Survey:
    """Understand `source`: a name that `hub.resolve` knows, a file, a shard index, a component's or a model's folder.

    `half` and `weights` ("auto", "ema", "raw") say which variant of a folder's files is meant; `prediction` overrides
    the prediction type; `only` looks for this component alone. Raises FileNotFoundError where there is nothing,
    CheckpointError for what is no weight file or a broken one, ValueError for other `weights` or `prediction`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: must be 'auto', 'ema' or 'raw'")
    path = resolve(source, half=half, weights=weights, component=only)
    found = find_files(path, half=half, weights=weights, only=only)
    sets = {place: files for place, (files, _) in found.items()}
    flaws: list[str] = []
    told = told_of_schedule(path, sets, prediction, flaws)
    parts: dict[str, Part] = {}
    for place, (files, config) in found.items():
        wanted = [only or place] if only or place else FAMILY
        found_parts = (part for component in wanted for part in find_parts(component, files, config, told.prediction))
        parts |= {part.title: part for part in found_parts}
    others = (stranger(files.tensors) for files in sets.values())
    generation = told_of_generation(path, sets, flaws)
    notes = [note for part in parts.values() for note in part.notes]
    notes += [note for files in sets.values() for note in damaged_ids(files)] + [f"{path}: {n}" for n in told.notes]
    if weights == "auto" and {"unet", AVERAGED} <= parts.keys():
        notes.append(f"{path}: holds raw and averaged (EMA) UNet weights; the raw ones are used (weights=...)")
    return Survey(path, sets, parts, next(filter(None, others), None), told, generation, tuple(notes), tuple(flaws))


def find(source: str | os.PathLike[str], weights: str = "auto") -> dict[str, Part]:
    """The components at `source`, whole or not, for a look at their weights.

    Raises as `survey`, and CheckpointError for what holds no part of Stable Diffusion 1.x.
    """
    found = survey(source, weights=weights)
    if found.other:
        found.check_family()
    if not found.parts:
        raise CheckpointError(f"{found.path}: holds no part of Stable Diffusion 1.x or 2.x")
    return found.chosen(weights)


# ---- files -------------------------------------------------------------------------------------------------------


def find_files(path: Path, *, half: bool, weights: str, only: str | None) -> dict[str, tuple[Files, Path | None]]:
    """Every set of weight files at `path`, with the config.json beside it: a file, the shards of an index, a folder of
    one component, or a model's folder, which has one set a component. "" stands for a set without a folder of its own.
    """
    if not path.is_dir():
        paths = shard_paths(path) if path.suffix == ".json" else [path]
        return {"": (open_files(paths, path), None)}
    names = (only,) if only else FAMILY
    folders = {name: path / name for name in names if (path / name).is_dir()} or {"": path}
    if "text_encoder_2" in folders and "text_encoder" not in folders and not only:  # SDXL's refiner has that one alone
        folders["text_encoder"] = folders.pop("text_encoder_2")
    endings = (*PICKLES, ".safetensors", ".safetensors.index.json")
    if "" in folders and not only and not any(entry.name.endswith(endings) for entry in path.iterdir()):
        raise CheckpointError(f"{path}: is not a model in diffusers' layout: it has no folder unet/, and no weights")
    return {
        name: (
            open_component_folder(folder, name or only or "unet", half=half, weights=weights),
            folder / "config.json",
        )
        for name, folder in folders.items()
    }


PICKLES = (".bin", ".ckpt", ".pt")


def open_component_folder(folder: Path, component: str, *, half: bool, weights: str) -> Files:
    """The weights in one folder of diffusers' layout, whichever variant and however many shards."""
    names = sorted(entry.name for entry in folder.iterdir())
    for stem in dict.fromkeys((ALL_STEMS[component], *ALL_STEMS.values())):
        variant = variant_of(names, stem, half=half, weights=weights)
        if variant is None:
            continue
        single = folder / single_name(stem, variant)
        if single.name in names:
            return open_files([single], single)
        index = folder / index_name(stem, variant)
        return open_files(shard_paths(index), index)
    if any(name.endswith(PICKLES) for name in names):
        raise CheckpointError(f"{folder}: holds pickles only, which may run code when opened: {WAY_OUT}")
    raise CheckpointError(f"{folder}: has no {ALL_STEMS[component]}.safetensors")


def described(files: Files) -> str:
    """ ": it is ..." where that can be said."""
    other = stranger(files.tensors)
    if other:
        return f": it is {other}"
    found = [TITLES[name] for name in COMPONENTS if namings(name, files.tensors)]
    names = [shown(name, 60) for name in sorted(files.tensors)[:3]]
    return f": it holds {' and '.join(found)}" if found else f": its names begin with {names}"


# ---- components --------------------------------------------------------------------------------------------------


def find_parts(component: str, files: Files, config: Path | None, prediction: str) -> Iterator[Part]:
    """A component under each set of names that it has in the files."""
    for naming in namings(component, files.tensors).values():
        if component == "text_encoder_2" and config is None and not naming.prefix:
            continue  # plain names are those of a text encoder alone
        notes: list[str] = []
        (numbers, flaw), problems = configuration(component, naming, files, config, prediction, notes), Problems()
        keys = list(KEYS[component](numbers))
        found = match(keys, files.tensors, naming, problems)
        yield Part(component, numbers, keys, found, problems, files, flaw, tuple(notes))


def configuration(
    component: str, naming: Naming, files: Files, path: Path | None, prediction: str, notes: list[str]
) -> tuple[Any, str | None]:
    """The configuration, and why the stated one cannot be used.

    From config.json, else from the metadata, else from the shapes, else SD 1.5's: in comparison with that it shows what
    is wrong.
    """
    flaw = f"{path}: is missing" if path is not None and not path.exists() else None
    where = str(path) if path is not None else f"{files.path} ({OURS})"
    file = read_json_object(path) if path is not None and not flaw else None
    try:
        stated = stored_json(files, "minisd.config", component) if file is None else known_fields(component, file)
        if stated is not None:
            return configs.READERS[component](stated, where, notes), flaw
    except CheckpointError as error:
        flaw = str(error)
    except (TypeError, AttributeError):
        flaw = f"{where}: holds a broken configuration of the {TITLES[component]}"
    try:
        config: Any = INFER[component](files.tensors, naming)
        sd2 = component == "unet" and config.linear_projections and not config.added_width
        if sd2 and prediction == "v_prediction":
            config = replace(config, sample_size=96)  # SD 2.x learned v at 768 x 768 pixels
        return configs.build(type(config), vars(config).copy(), f"{files.path}: {TITLES[component]} shapes"), flaw
    except CheckpointError as error:
        message = str(error)
        inferred = message if str(files.path) in message else f"{files.path}: {message}"
        return getattr(SD15, component) or SD15.text_encoder, flaw or inferred


def known_fields(component: str, config: dict[str, Any]) -> dict[str, Any]:
    """A component's configuration, out of that of all of CLIP where it is in there."""
    if component in TEXT_ENCODERS and isinstance(config.get("text_config"), dict):
        known = configs.TEXT_ENCODER.used | configs.TEXT_ENCODER.neutral
        return {name: value for name, value in config["text_config"].items() if name in known}
    return config


def stored_json(files: Files, name: str, key: str | None = None) -> Any:
    """A JSON object in a file's metadata, or what it has under `key`; or None. Raises CheckpointError if broken."""
    stored = parsed(files.metadata.get(name, "null"))
    if stored is not None and not isinstance(stored, dict):
        raise CheckpointError(f"{files.path}: its metadata holds a broken {name}")
    return stored if key is None else (stored or {}).get(key)


@lru_cache(4)
def parsed(text: str) -> Any:
    """A JSON value; False for anything else. Each component asks for the same text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return False


# ---- schedule, generation, fit -----------------------------------------------------------------------------------


def told_of_schedule(path: Path, sets: dict[str, Files], prediction: str | None, flaws: list[str]) -> Schedule:
    """What the schedule's file, or the single file, says of the schedule; SD 1.5's where that is broken."""
    try:
        if "" not in sets:
            file = path / SCHEDULER_CONFIG
            own = read_json_object(file) if file.exists() else None
            told = schedule.understand(schedule.Stated(own, str(file), (), {}, None, None), prediction)
            # diffusers' pipeline forces these two on whatever schedule it is given, and images depend on them.
            told.settings.update({"clip_sample": False, "steps_offset": 1} if own is not None else {})
            return told
        files = sets[""]
        own = stored_json(files, "minisd.config", "scheduler")
        if own is not None and not isinstance(own, dict):
            raise CheckpointError(f"{files.path}: its metadata holds a broken minisd.config")
        beside = None if path.is_dir() else path
        stated = schedule.Stated(
            own, f"{files.path} ({OURS})", files.tensors.keys(), files.metadata, beside, usual_prediction(files)
        )
        return schedule.understand(stated, prediction)
    except CheckpointError as error:
        flaws.append(str(error))
        return Schedule(dict(SD15.scheduler), (), ())


def usual_prediction(files: Files) -> str | None:
    """What a single file of SD 2.x predicts that does not say so: v, but for inpainting and the 512-pixel models.

    Those were trained on to step 875,000, which some files still tell: diffusers goes by that too.
    """
    if OPENCLIP_MARK not in files.tensors:
        return None
    conv_in = files.tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    step = files.tensors.get("global_step")
    if step is not None and step.end - step.start <= 8 and numbers_of(files.location["global_step"], step) == [875_000]:
        return "epsilon"
    return "v_prediction" if conv_in is None or conv_in.shape[1:2] == (4,) else "epsilon"


def told_of_generation(path: Path, sets: dict[str, Files], flaws: list[str]) -> dict[str, Any]:
    """The settings that the model's makers recommend."""
    try:
        if "" in sets:
            return stored_json(sets[""], "minisd.generation") or {}
        recommended = path / GENERATION_CONFIG
        return read_json_object(recommended) if recommended.exists() else {}
    except CheckpointError as error:
        flaws.append(str(error))
        return {}


def check_fit(path: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError where the components do not agree on the widths where they meet."""
    unet, vae, text, second = (*(config[name] for name in COMPONENTS), config.get("text_encoder_2"))
    width = text.width + (second.width if second else 0)
    if unet.context_width != width:
        raise CheckpointError(
            f"{path}: the UNet expects text of width {unet.context_width}, the text encoder gives {width}"
        )
    pooled = (second or text).projection
    # Of the original picture, of the crop's corner, and of the picture wanted or, in the refiner, how beautiful it is.
    numbers = 6 if second else 5 if pooled else 0
    if unet.added_width != pooled + numbers * unet.number_width:
        raise CheckpointError(
            f"{path}: beside text the UNet expects {unet.added_width} numbers, and the text encoders give {pooled}"
        )
    if unet.out_channels != vae.latent_channels:
        raise CheckpointError(
            f"{path}: the UNet makes {unet.out_channels} latent channels, the VAE has {vae.latent_channels}"
        )


def check_tokenizer(path: Path, tokenizer: Any, config: TextEncoderConfig) -> None:
    """Raise CheckpointError where a tokenizer has ids or lengths that the text encoder has not."""
    if max(tokenizer.vocabulary.values()) >= config.vocabulary or tokenizer.context_length > config.context_length:
        raise CheckpointError(
            f"{path}: the tokenizer ({len(tokenizer.vocabulary):,} tokens, {tokenizer.context_length} long) does not "
            f"fit the text encoder ({config.vocabulary:,} tokens, {config.context_length} long); give tokenizer= "
            "(--tokenizer FOLDER)"
        )


def damaged_ids(files: Files) -> Iterator[str]:
    """The text encoder's positions are 0, 1, 2, ...; a file that says otherwise was damaged by a merge."""
    for name, info in files.tensors.items():
        if name.endswith("embeddings.position_ids") and is_damaged(files.location[name], info):
            yield f"{files.path}: {name} is damaged; minisd and diffusers do not use it, some programs do"


def is_damaged(path: Path, info: TensorInfo) -> bool:
    """Whether position ids, 0 to 76, are anything else. A few hundred bytes: the only values that are read here."""
    if info.end - info.start > 10_000:
        return True
    return numbers_of(path, info) != list(range(prod(info.shape)))


def numbers_of(path: Path, info: TensorInfo) -> list[float]:
    """The values of a small tensor."""
    with path.open("rb") as file:
        file.seek(info.start)
        return as_numbers(info.dtype, file.read(info.end - info.start))


def as_numbers(dtype: str, data: bytes) -> list[float]:
    """Little-endian numbers; [] for a dtype that no position ids ever had."""
    if dtype == "BF16":  # the upper half of a float32
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    letters = {"I64": "q", "I32": "i", "I16": "h", "F32": "f", "F64": "d", "F16": "e"}
    size = struct.calcsize(letters[dtype]) if dtype in letters else 0
    return list(struct.unpack(f"<{len(data) // size}{letters[dtype]}", data)) if size else []
