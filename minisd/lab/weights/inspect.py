"""What is in a weight file: understood from its header alone, so that 8 GB take as long as 8 MB.

    report = inspect("model.safetensors")
    print(report.what, report.parts["unet"].naming, report.warnings)

A file that is whole but cannot be loaded is described, with the reason; only what is not a weight file at all raises.
This file needs the standard library only. `report.py` says the same in words, `scan.py` looks at the values.
"""

import os
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from minisd.checkpoint.errors import CheckpointError
from minisd.checkpoint.files import Files
from minisd.checkpoint.finding import Found, find_components, find_files
from minisd.checkpoint.header import TensorInfo
from minisd.checkpoint.hub import resolve
from minisd.checkpoint.keymap import COMPONENTS
from minisd.checkpoint.naming import TITLES, Match, Naming, ignorable, stranger, way_out
from minisd.checkpoint.textfiles import read_json_object, read_text
from minisd.config import SD15
from minisd.lab.weights.official import official

SCHEDULE = Path("scheduler") / "scheduler_config.json"
MAX_STEPS = 1_000_000  # schedulers' MAX_TIMESTEPS: they come with torch, this file does not

KINDS = {4: "", 5: " for depth to image", 8: " for editing by instruction", 9: " for inpainting"}  # by channels in


@dataclass
class Part:
    """One component of a model. A UNet that is there twice, raw and averaged, is two parts."""

    component: str
    naming: str  # "diffusers", "CompVis", with what is unusual about it
    found: int
    missing: list[str]  # the file's own naming; empty if it is complete
    misshapen: list[str]
    dtypes: dict[str, int]
    parameters: int
    bytes: int
    config: dict[str, Any]
    flaw: str | None  # anything else that is wrong with it
    match: Match = field(repr=False)
    files: Files = field(repr=False)

    @property
    def sources(self) -> dict[str, str]:
        """minisd's name -> the file's."""
        return {ours: name for ours, (name, _) in self.match.sources.items()}

    @property
    def complete(self) -> bool:
        return not self.missing and not self.misshapen


@dataclass
class Report:
    """All that a header tells. `problem` is why minisd would not load it, or None."""

    path: str
    what: str
    bytes: int
    tensors: int
    parts: dict[str, Part]  # "unet", "unet (averaged)", "vae", "text_encoder"
    leftovers: dict[str, list[str]]  # kind -> names
    metadata: dict[str, str]
    hints: list[str]
    warnings: list[str]
    official: str | None
    problem: str | None
    files: list[Files] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: without the long lists of names."""
        parts = {
            name: {key: value for key, value in vars(part).items() if key not in ("match", "files")}
            | {"complete": part.complete}
            for name, part in self.parts.items()
        }
        leftovers = {kind: len(names) for kind, names in self.leftovers.items()}
        told = {key: value for key, value in vars(self).items() if key != "files"}
        return told | {"parts": parts, "leftovers": leftovers}


def inspect(source: str | os.PathLike[str]) -> Report:
    """Understand a file, a shard index, a component's folder or a model's folder.

    Raises FileNotFoundError where there is nothing, CheckpointError for what is not a weight file.
    """
    path = resolve(source)
    sets = find_files(path)
    if set(sets) <= {""}:
        return inspect_files(*sets[""])
    return inspect_folder(path, {name: inspect_files(*files) for name, files in sets.items()})


def inspect_folder(path: Path, reports: Mapping[str, Report]) -> Report:
    """A model in diffusers' layout, out of what is said of its components."""
    flaws = [flaw for report in reports.values() for file in report.files if (flaw := flaw_of(file, report))]
    parts = {name: part for report in reports.values() for name, part in report.parts.items()}
    return Report(
        path=str(path),
        what=name_of(parts, {}) + ", a folder in diffusers' layout",
        bytes=sum(report.bytes for report in reports.values()),
        tensors=sum(report.tensors for report in reports.values()),
        parts=parts,
        leftovers=merged(report.leftovers for report in reports.values()),
        metadata={key: value for report in reports.values() for key, value in report.metadata.items()},
        hints=[hint for report in reports.values() for hint in report.hints] + schedule_hints(path),
        warnings=[warning for report in reports.values() for warning in report.warnings],
        official=None,
        problem=flaws[0] if flaws else absence(parts) or settings_flaw(path),
        files=[file for report in reports.values() for file in report.files],
    )


def inspect_files(files: Files, config: Path | None = None) -> Report:
    """One file or its shards; with the config.json beside it, if there is one."""
    names = files.tensors
    other = stranger(names)
    parts = {} if other else {title_of(found): describe(found) for found in find_components(files, config)}
    used = {name for part in parts.values() for name in part.match.used}
    leftovers = group(name for name in names if name not in used)
    size = sum(path.stat().st_size for path in set(files.location.values()) or {files.path})
    report = Report(
        path=str(files.path),
        what=strange_name(other, names) if other else name_of(parts, names),
        bytes=size,
        tensors=len(names),
        parts=parts,
        leftovers=leftovers,
        metadata=dict(files.metadata),
        hints=list(hints(files)),
        warnings=list(warnings(files, parts)),
        official=official(dict(names), size),
        problem=None,
        files=[files],
    )
    report.problem = flaw_of(files, report) or absence(parts)
    return report


# ---- the parts -------------------------------------------------------------------------------------------


def title_of(found: Found) -> str:
    return found.component + " (averaged)" * found.averaged


def describe(found: Found) -> Part:
    """What of a component is there, by the configuration that its shapes (or its config.json) tell."""
    names = [name for name, _ in found.match.sources.values()]
    infos = [found.files.tensors[name] for name in names]
    return Part(
        component=found.component,
        naming=words_for(found.match.naming, names),
        found=len(names),
        missing=[name for name, _ in found.problems.missing],
        misshapen=[f"{name} is {list(got)}, not {list(want)}" for name, got, want in found.problems.shape],
        dtypes=dict(Counter(info.dtype for info in infos).most_common()),
        parameters=sum(prod(info.shape) for info in infos),
        bytes=sum(info.end - info.start for info in infos),
        config=vars(found.config).copy(),
        flaw=other_flaw(found),
        match=found.match,
        files=found.files,
    )


def other_flaw(found: Found) -> str | None:
    """What besides missing and misshapen weights keeps a component from loading."""
    if found.problems.dtype:
        return "the weight {} has the dtype {}".format(*found.problems.dtype[0])
    if found.problems.twice:
        return "{} and {} are one weight under two names".format(*found.problems.twice[0])
    if found.problems.scale:
        return "{} {}: a scale of 8-bit weights that minisd does not understand".format(*found.problems.scale[0])
    return found.flaw


def words_for(naming: Naming, names: Iterable[str]) -> str:
    """The dialect, for people."""
    words = {"diffusers": "diffusers", "compvis": "CompVis", "ema": "CompVis, averaged (EMA)"}[naming.column]
    words += f", prefix {naming.prefix!r}" if naming.prefix else ", no prefix"
    if any(".query." in name or ".proj_attn." in name for name in names):
        words += ", old attention names (query, key, value)"
    return words + (", without text_model." if naming.bare_text else "")


# ---- what it is, in one line -----------------------------------------------------------------------------


def name_of(parts: Mapping[str, Part], names: Mapping[str, TensorInfo]) -> str:
    """`Stable Diffusion 1.x for inpainting, raw and averaged (EMA) weights`."""
    unet = parts.get("unet") or parts.get("unet (averaged)")
    present = [component for component in COMPONENTS if any(p.component == component for p in parts.values())]
    if not present:
        return f"not Stable Diffusion: {len(names)} tensors such as {', '.join(sorted(names)[:3]) or 'none'}"
    kind = KINDS.get(unet.config["in_channels"], f" with {unet.config['in_channels']} channels in") if unet else ""
    both = {name for name in parts if name.startswith("unet")}
    sets = {1: "" if "unet" in both else ", averaged (EMA) weights only", 2: ", raw and averaged (EMA) weights"}
    whole = "Stable Diffusion 1.x" + kind + sets.get(len(both), "")
    if len(present) == len(COMPONENTS):
        return whole
    only = " and ".join(TITLES[component] for component in present)
    return f"{only} only, of {whole}" if unet else f"{only} only"


def strange_name(label: str, names: Mapping[str, TensorInfo]) -> str:
    """What else it is, a LoRA with its dialect."""
    return f"a LoRA, {lora_dialect(names)}" if label.startswith("a LoRA") else label


def lora_dialect(names: Iterable[str]) -> str:
    """Who wrote it and of what kind it is, by the ends of its names."""
    names = list(names)

    def any_with(*marks: str) -> bool:
        return any(mark in name for name in names for mark in marks)

    if any_with(".hada_w"):
        kind = "LoHa"
    elif any_with(".lokr_w"):
        kind = "LoKr"
    elif any_with(".lora_mid."):
        kind = "LoCon with Tucker decomposition"
    elif any_with("_conv1.lora_", "_conv2.lora_", "_in_layers_2.lora_", ".conv1.lora_", ".conv2.lora_"):
        kind = "LoCon (convolutions too)"
    else:
        kind = "plain"
    if any_with(".dora_scale", "lora_magnitude_vector"):
        kind += ", DoRA"
    if any_with("lora_unet_", "lora_te_"):
        return f"kohya's names, {kind}"
    if any_with(".processor."):
        return f"old diffusers names, {kind}"
    return f"{'PEFT' if any_with('.lora_A.') else 'diffusers'} names, {kind}"


# ---- the rest of the file --------------------------------------------------------------------------------


def group(names: Iterable[str]) -> dict[str, list[str]]:
    """Leftovers by the class that `layouts.ignorable` knows; what it does not know is "unknown"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(ignorable(name) or "unknown", []).append(name)
    return groups


def merged(groups: Iterable[dict[str, list[str]]]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for one in groups:
        for kind, names in one.items():
            result.setdefault(kind, []).extend(names)
    return result


def hints(files: Files) -> Iterable[str]:
    """What the file says of how it wants to be sampled."""
    if "v_pred" in files.tensors:
        yield "v-prediction (it holds a tensor v_pred)"
    if "ztsnr" in files.tensors:
        yield "zero terminal SNR (it holds a tensor ztsnr)"
    told = {"modelspec.prediction_type": "prediction type", "modelspec.encoder_layer": "CLIP layer, from the end"}
    for key, meaning in told.items():
        if key in files.metadata:
            yield f"{meaning}: {files.metadata[key]} (metadata {key})"


def schedule_hints(folder: Path) -> list[str]:
    """The prediction type that a folder's scheduler states, if it is not noise."""
    try:
        kind = schedule_of(folder).get("prediction_type", "epsilon")
    except CheckpointError:
        return []  # the report names it as what is wrong
    return [f"prediction type: {kind} (scheduler_config.json)"] if kind != "epsilon" else []


def warnings(files: Files, parts: Mapping[str, Part]) -> Iterable[str]:
    """What may surprise."""
    if {"unet", "unet (averaged)"} <= parts.keys():
        yield "raw and averaged (EMA) UNet weights: programs differ in which they take; minisd takes the raw ones"
    for part in parts.values():
        if len(part.dtypes) > 1:
            yield f"{TITLES[part.component]}: mixed dtypes {', '.join(part.dtypes)}"
        if any(dtype.startswith("F8") for dtype in part.dtypes):
            yield f"{TITLES[part.component]}: 8-bit floats, which lost most of their precision"
    scales = sum(len(part.match.scales) for part in parts.values())
    if scales:
        yield f"{scales} scale{'s' * (scales > 1)} of 8-bit weights: a program that ignores them paints white"
    for name, info in files.tensors.items():
        if name.endswith("embeddings.position_ids") and damaged(files.location[name], info):
            yield f"{name} is damaged (a merge did that): minisd and diffusers do not use it, other programs do"
    vae = parts.get("vae")
    if vae and vae.config["scaling_factor"] not in (SD15.vae.scaling_factor, None) and vae.config["widths"][0] >= 128:
        yield f"VAE: scaling factor {vae.config['scaling_factor']}, where SD 1.x has {SD15.vae.scaling_factor}"


def damaged(path: Path, info: TensorInfo) -> bool:
    """Whether position ids, 0 to 76, are anything else. A few hundred bytes: the only values that are read here."""
    if info.end - info.start > 10_000:
        return True
    with path.open("rb") as file:
        file.seek(info.start)
        data = file.read(info.end - info.start)
    return as_numbers(info.dtype, data) != list(range(prod(info.shape)))


def as_numbers(dtype: str, data: bytes) -> list[float]:
    """Little-endian numbers; [] for a dtype that no position ids ever had."""
    if dtype == "BF16":  # the upper half of a float32
        return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    letters = {"I64": "q", "I32": "i", "I16": "h", "F32": "f", "F64": "d", "F16": "e"}
    size = struct.calcsize(letters[dtype]) if dtype in letters else 0
    return list(struct.unpack(f"<{len(data) // size}{letters[dtype]}", data)) if size else []


def flaw_of(files: Files, report: Report) -> str | None:
    """Why minisd would refuse what is in the files, or None."""
    other = stranger(files.tensors)
    if other:
        return f"it is {other}; {way_out(other)}"
    for part in report.parts.values():
        if part.missing:
            return f"{TITLES[part.component]}: {len(part.missing)} tensors are missing, such as {part.missing[0]}"
        if part.misshapen:
            return f"{TITLES[part.component]}: {part.misshapen[0]}"
        if part.flaw:
            return f"{TITLES[part.component]}: {part.flaw}"
    unknown = report.leftovers.get("unknown", [])
    return f"{len(unknown)} unknown tensors, such as {unknown[0]}" if unknown else None


def settings_flaw(folder: Path) -> str | None:
    """What is wrong with the small files of a model's folder, as far as can be told without building anything."""
    words = folder / "tokenizer"
    names = ["tokenizer.json"] if (words / "tokenizer.json").is_file() else ["vocab.json", "merges.txt"]
    try:
        for name in names:
            (read_json_object if name.endswith(".json") else read_text)(words / name)
        steps = schedule_of(folder).get("num_train_timesteps", 1000)
    except CheckpointError as error:
        return str(error)
    known = isinstance(steps, int) and 1 <= steps <= MAX_STEPS
    return None if known else f"{folder / SCHEDULE}: num_train_timesteps={steps!r} is impossible"


def schedule_of(folder: Path) -> dict[str, Any]:
    """The settings of the noise schedule; {} where they are missing, which means SD 1.5's."""
    return read_json_object(folder / SCHEDULE) if (folder / SCHEDULE).is_file() else {}


def absence(parts: Mapping[str, Part]) -> str | None:
    """Which components of a whole model are not there, or None."""
    present = {part.component for part in parts.values()}
    absent = [TITLES[component] for component in COMPONENTS if component not in present]
    return f"it has no {' and no '.join(absent)}" if absent else None
