"""Settings out of a PNG: minisd's, AUTOMATIC1111's, ComfyUI's and stable-diffusion.cpp's.

In: a picture file from anywhere. Out: `Found`, the settings under minisd's names, and what there is that minisd cannot
honour. Nothing in the file is executed, and no file that it names is opened.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from minisd.files import shown
from minisd.schedulers.names import SPACINGS, plain, table

MOST = 4 << 20  # bytes of settings: workflows of hundreds of nodes have a tenth of that
PAIR = re.compile(r'\s*([^:,"]{1,60}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
LORA = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")
SILENT = {"Version", "Model hash", "VAE hash", "Lora hashes", "Hashes", "Schedule type", "Model", "Clip skip", "RNG"}
SAMPLER = {"steps": "steps", "cfg": "guidance_scale", "seed": "seed", "noise_seed": "seed"}  # ComfyUI's
KINDS: dict[str, Any] = {"call": str, "options": dict, "index": int | str, "minisd": str, "files": dict}
KINDS |= {"missing": list, "load": dict}


@dataclass
class Found:
    """What a picture says of how it was made."""

    program: str
    settings: dict[str, Any]  # under the names of `Sampling`, and prompt, model
    lost: list[str] = field(default_factory=list)  # what minisd cannot honour, one sentence each
    record: dict[str, Any] | None = None  # minisd's own, from which it can be made again
    text: str = ""


def read_settings(path: str | os.PathLike[str]) -> Found:
    """The settings in a picture file. Raises ValueError for a file that is no picture, or has none."""
    texts = texts_of(path)
    try:
        if "minisd" in texts:
            return own(json.loads(texts["minisd"]), texts.get("parameters", ""))
        if "parameters" in texts:
            return a1111(texts["parameters"])
        if "prompt" in texts:
            return comfyui(json.loads(texts["prompt"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: has settings that cannot be read ({shown(error)})") from None
    raise ValueError(
        f"{path}: has no settings in it; minisd, AUTOMATIC1111, ComfyUI and stable-diffusion.cpp write them into PNGs, "
        "and chat programs and picture editors drop them"
    )


def texts_of(path: str | os.PathLike[str]) -> dict[str, str]:
    """The texts in a picture file, a JPEG's comment being `parameters`."""
    try:
        with Image.open(os.path.expanduser(path)) as picture:
            if picture.format == "PNG":
                picture.load()  # texts may stand behind the pixels
            texts = {str(name): value for name, value in picture.info.items() if isinstance(value, str)}
            comment = picture.getexif().get_ifd(0x8769).get(0x9286)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: is not a picture that can be read ({shown(error)})") from None
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
        texts.setdefault("parameters", comment[8:].decode("utf-16-be", "replace"))
    if sum(map(len, texts.values())) > MOST:
        raise ValueError(f"{path}: has more than {MOST:,} characters of settings")
    return texts


def own(record: Any, text: str) -> Found:
    """minisd's own record."""
    record = {"files": {}, "missing": [], "load": {}, **record}
    for name, kind in KINDS.items():
        if not isinstance(record[name], kind):
            raise ValueError(f"{name}: {shown(record[name], 40)}")
    options, load = record["options"], record["load"]
    if size := SIZE.fullmatch(str(options.get("size", ""))):
        options = {**options, "width": int(size[1]), "height": int(size[2])}
    settings = {"negative_prompt": "", **options, "model": options.get("model") or load.get("source")}
    return Found(f"minisd {record['minisd']}", settings, record=record, text=text)


# ---- AUTOMATIC1111 and stable-diffusion.cpp ---------------------------------------------------------------------


def a1111(text: str) -> Found:
    """Prompt, negative prompt, and one line of `Name: value` pairs."""
    *lines, last = text.strip().split("\n")
    pairs = {name.strip(): unquoted(value) for name, value in PAIR.findall(last)}
    if "Steps" not in pairs:  # the prompt alone
        lines, pairs = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
    version = pairs.get("Version", "")
    program = version if version.startswith(("stable-diffusion.cpp", "minisd")) else f"AUTOMATIC1111 {version}".strip()
    found = Found(program, {"prompt": prompt.strip(), "negative_prompt": negative.strip()}, text=text)
    take(found, pairs)
    return found


def unquoted(value: str) -> str:
    """A value as others write it: JSON where it has their separators."""
    value = value.strip()
    return str(json.loads(value)) if len(value) > 1 and value[0] == value[-1] == '"' else value


def take(found: Found, pairs: dict[str, str]) -> None:
    """Settings that are minisd's too, by minisd's names; the others are lost, and said to be."""
    numbers = {"Steps": ("steps", int), "CFG scale": ("guidance_scale", float), "Seed": ("seed", int)}
    numbers |= {"CFG rescale": ("guidance_rescale", float), "Eta": ("eta", float)}
    for label, (name, kind) in numbers.items():
        if label in pairs:
            found.settings[name] = kind(pairs.pop(label))
    if size := SIZE.fullmatch(pairs.pop("Size", "")):
        found.settings |= {"width": int(size[1]), "height": int(size[2])}
    if "Clip skip" in pairs:
        found.settings["clip_skip"] = max(0, int(pairs["Clip skip"]) - 1)
    if "Model" in pairs:
        found.settings["model"] = pairs["Model"]
    take_scheduler(found, pairs.pop("Sampler", ""), pairs.get("Schedule type", ""))
    if words := LORA.findall(found.settings["prompt"]):
        found.settings["prompt"] = LORA.sub("", found.settings["prompt"]).strip()
        found.lost.append(f"{' '.join(words)}: name the files with --lora PATH:SCALE")
    if pairs.get("RNG", "GPU").lower() not in ("cpu", "minisd") and not found.program.startswith("minisd"):
        found.lost.append("the noise was drawn by another generator than torch's on a CPU (RNG), so the seed differs")
    found.lost += [f"{name}: {shown(value, 60)}" for name, value in pairs.items() if name not in SILENT]


def take_scheduler(found: Found, sampler: str, spacing: str) -> None:
    """A sampler's name from another program, with the spacing of its noise levels."""
    words = re.sub(r"[^a-z]", "", spacing.lower())
    known = table().get(plain(f"{sampler} {words}" if words in SPACINGS else re.sub(r"[\[\]]", "", sampler)))
    known = known or table().get(plain(sampler))
    if known is not None:
        extra = next((f"_{name}" for name, arguments in SPACINGS.items() if arguments == known[1]), "")
        found.settings["scheduler"] = known[0] + extra
    elif sampler:
        found.lost.append(f"sampler {shown(sampler, 40)}: minisd has none of that name; ddim in its place")
    if words and words not in {*SPACINGS, "automatic", "uniform", "normal", "discrete"}:
        found.lost.append(f"spacing {shown(spacing, 40)}: the model's own in its place")


# ---- ComfyUI ----------------------------------------------------------------------------------------------------


def comfyui(nodes: Mapping[str, Any]) -> Found:
    """A graph of nodes: from the sampler along its links to the texts, the size and the model."""
    samplers = [node for node in nodes.values() if "Sampler" in node["class_type"] and "steps" in node["inputs"]]
    if not samplers:
        raise ValueError("no sampler among the nodes")
    sampler = samplers[0]
    inputs = sampler["inputs"]
    found = Found("ComfyUI", {own: inputs[name] for name, own in SAMPLER.items() if is_plain(inputs.get(name))})
    for name, role in (("prompt", "positive"), ("negative_prompt", "negative")):
        found.settings[name] = " ".join(upstream(nodes, inputs.get(role), "text"))
    latent, model = inputs.get("latent_image"), inputs.get("model")
    for name, link, key in (("width", latent, "width"), ("height", latent, "height"), ("model", model, "ckpt_name")):
        if (value := next(upstream(nodes, link, key), None)) is not None:
            found.settings[name] = value
    take_scheduler(found, str(inputs.get("sampler_name", "")), str(inputs.get("scheduler", "")))
    found.lost += [f"LoRA {shown(name, 60)}: --lora PATH" for name in upstream(nodes, model, "lora_name")]
    if inputs.get("denoise", 1) != 1:
        found.lost.append(f"denoise: {inputs['denoise']} (of another picture, which is not in the file)")
    found.lost += [f"{len(samplers) - 1} more samplers"] if len(samplers) > 1 else []
    return found


def is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def upstream(nodes: Mapping[str, Any], link: Any, key: str) -> Iterator[Any]:
    """Every input named `key` of the nodes that lead to a link, the nearest first; each node once."""
    waiting, seen = [link], set()
    while waiting:
        at = waiting.pop(0)
        if not isinstance(at, list) or not at or str(at[0]) in seen or str(at[0]) not in nodes:
            continue
        seen.add(str(at[0]))
        inputs = nodes[str(at[0])]["inputs"]
        if is_plain(inputs.get(key)):
            yield inputs[key]
        waiting += list(inputs.values())
