"""What is in a weight file: understood from its header alone, so that 8 GB take as long as 8 MB.

    report = inspect("model.safetensors")
    print(report.what, report.parts["unet"].dtypes, report.warnings)

A file that is whole but cannot be loaded is described, with the reason; only what is not a weight file at all raises.
This file needs the standard library only. `report.py` says the same in words, `scan.py` looks at the values.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minisd.checkpoint.header import Files, TensorInfo, fused_name
from minisd.checkpoint.infer import XL_SCALING
from minisd.checkpoint.keymap import FAMILY
from minisd.checkpoint.naming import TITLES, ignorable
from minisd.checkpoint.survey import AVERAGED, Part, Survey, survey
from minisd.config import SD15
from minisd.files import shown
from minisd.lab.weights.official import official

KINDS = {4: "", 5: " for depth to image", 8: " for editing by instruction", 9: " for inpainting"}  # by channels in


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
        told = {key: value for key, value in vars(self).items() if key != "files"}
        leftovers = {kind: len(names) for kind, names in self.leftovers.items()}
        return told | {"parts": {title: facts(part) for title, part in self.parts.items()}, "leftovers": leftovers}


def inspect(source: str | os.PathLike[str]) -> Report:
    """Understand a file, a shard index, a component's folder or a model's folder.

    Raises FileNotFoundError where there is nothing, CheckpointError for what is not a weight file.
    """
    found = survey(source)
    sets = list(found.sets.values())
    names = {name: info for files in sets for name, info in files.tensors.items()}
    parts = {} if found.other else found.parts
    size = sum(path.stat().st_size for files in sets for path in set(files.location.values()) or {files.path})
    return Report(
        path=str(found.path),
        what=what_it_is(found, parts, names),
        bytes=size,
        tensors=sum(len({fused_name(name)[0] for name in files.tensors}) for files in sets),
        parts=parts,
        leftovers=group(leftovers(sets, parts.values())),
        metadata={key: value for files in sets for key, value in files.metadata.items()},
        hints=hints(found),
        warnings=[*found.notes, *warnings(parts)],
        official=official(names, size) if len(sets) == 1 else None,
        problem=found.problem(),
        files=sets,
    )


# ---- the parts -------------------------------------------------------------------------------------------


def facts(part: Part) -> dict[str, Any]:
    """What of a component is there, by the configuration that its shapes (or its config.json) tell."""
    names = ("component", "missing", "misshapen", "dtypes", "parameters", "bytes", "flaw", "complete")
    found = {name: getattr(part, name) for name in names}
    return found | {"naming": naming(part), "found": len(part.sources), "config": vars(part.config).copy()}


def naming(part: Part) -> str:
    """The dialect, for people: "diffusers" or "CompVis", with what is unusual about it."""
    naming, names = part.match.naming, part.sources.values()
    words = {"diffusers": "diffusers", "compvis": "CompVis", "ema": "CompVis, averaged (EMA)"}[naming.column]
    words += f", prefix {naming.prefix!r}" if naming.prefix else ", no prefix"
    if any(".query." in name or ".proj_attn." in name for name in names):
        words += ", old attention names (query, key, value)"
    return words + (", without text_model." if naming.bare_text else "")


# ---- what it is, in one line -----------------------------------------------------------------------------


def what_it_is(found: Survey, parts: Mapping[str, Part], names: Mapping[str, TensorInfo]) -> str:
    """The kind of model, in one line."""
    if found.other:
        return strange_name(found.other, names)
    return name_of(parts, names) + (", a folder in diffusers' layout" if found.layout == "diffusers" else "")


def family_of(parts: Mapping[str, Part]) -> str:
    """Which Stable Diffusion it is, as one of the components says."""
    unet, text = parts.get("unet") or parts.get(AVERAGED), parts.get("text_encoder")
    if text and text.config.projection:
        return "XL, refiner"
    if "text_encoder_2" in parts or (unet and unet.config.added_width):
        return "XL"
    return "2.x" if (unet and unet.config.linear_projections) or (text and text.config.openclip) else "1.x"


def name_of(parts: Mapping[str, Part], names: Mapping[str, TensorInfo]) -> str:
    """`Stable Diffusion 1.x for inpainting, raw and averaged (EMA) weights`."""
    unet = parts.get("unet") or parts.get(AVERAGED)
    present = [component for component in FAMILY if any(p.component == component for p in parts.values())]
    if not present:
        some = ", ".join(shown(name, 60) for name in sorted(names)[:3])
        return f"not Stable Diffusion: {len(names)} tensors such as {some or 'none'}"
    kind = KINDS.get(unet.config.in_channels, f" with {unet.config.in_channels} channels in") if unet else ""
    both = {name for name in parts if name.startswith("unet")}
    sets = {1: "" if "unet" in both else ", averaged (EMA) weights only", 2: ", raw and averaged (EMA) weights"}
    family = family_of(parts)
    whole = f"Stable Diffusion {family}" + kind + sets.get(len(both), "")
    if len(present) == len(FAMILY) - (family != "XL"):
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
    """Leftovers by the class that `naming.ignorable` knows; what it does not know is "unknown"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(ignorable(name) or "unknown", []).append(name)
    return groups


def leftovers(sets: Iterable[Files], parts: Iterable[Part]) -> Iterable[str]:
    """The tensors that no part uses."""
    used = {(id(part.files), name) for part in parts for name in part.match.used}
    return (name for files in sets for name in files.tensors if (id(files), name) not in used)


def hints(found: Survey) -> list[str]:
    """What the files say of how they want to be sampled."""
    layers = {files.metadata.get("modelspec.encoder_layer") for files in found.sets.values()} - {None}
    name = "modelspec.encoder_layer"
    return [*found.schedule.hints, *(f"CLIP layer, from the end: {shown(n, 40)} (metadata {name})" for n in layers)]


def warnings(parts: Mapping[str, Part]) -> Iterable[str]:
    """What may surprise."""
    for part in parts.values():
        if len(part.dtypes) > 1:
            yield f"{TITLES[part.component]}: mixed dtypes {', '.join(part.dtypes)}"
        if any(dtype.startswith("F8") for dtype in part.dtypes):
            yield f"{TITLES[part.component]}: 8-bit floats, which lost most of their precision"
    scales = sum(len(part.match.scales) for part in parts.values())
    if scales:
        yield f"{scales} scale{'s' * (scales > 1)} of 8-bit weights: a program that ignores them generates white images"
    vae = parts.get("vae")
    usual = XL_SCALING if family_of(parts) == "XL" else SD15.vae.scaling_factor
    if vae and vae.config.scaling_factor not in (usual, None) and vae.config.widths[0] >= 128:
        yield f"VAE: scaling factor {vae.config.scaling_factor}, where {usual} is usual"
