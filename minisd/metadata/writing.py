"""Settings into PNGs: the `parameters` text that other programs read, and minisd's own JSON.

In: a picture and its settings. Out: a PIL image whose `save` writes them. Command and library write by this file alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

import minisd
from minisd.sampling import Sampling, Texts
from minisd.schedulers.names import a1111_name

TEXTS = ("parameters", "minisd")  # the names of the texts in a PNG

# What other programs call the settings in a PNG's `parameters` text.
LABELS = {
    "steps": "Steps",
    "scheduler": "Sampler",
    "guidance": "CFG scale",
    "guidance_rescale": "CFG rescale",
    "eta": "Eta",
    "clip_skip": "Clip skip",
    "seed": "Seed",
}


class Picture(Image.Image):
    """A PIL image that writes its settings when it is saved as PNG.

    They are in `info` under the names `parameters` and `minisd`, where Pillow puts them when it opens the file. Two
    pictures are equal when their pixels are.
    """

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        super().save(fp, format, **{"pnginfo": chunks(self.info), **params})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image.Image) and pixels(self) == pixels(other)

    __hash__ = None  # type: ignore[assignment]  # as every PIL image


def pixels(picture: Image.Image) -> tuple[str, tuple[int, int], bytes]:
    """All that is seen of a picture."""
    return picture.mode, picture.size, picture.tobytes()


def signed(picture: Image.Image, parameters: str, record: Mapping[str, Any] | None) -> Picture:
    """The picture with its settings; `record` is what makes it again, None where nothing does."""
    made = Picture.__new__(Picture)
    made.__setstate__(picture.__getstate__())
    made.info.clear()
    made.info["parameters"] = parameters
    if record is not None:
        made.info["minisd"] = json.dumps(record, sort_keys=True)
    return made


def chunks(info: Mapping[Any, Any]) -> PngImagePlugin.PngInfo:
    """The texts of a PNG."""
    text = PngImagePlugin.PngInfo()
    for name in TEXTS:
        if name in info:
            (text.add_text if info[name].isascii() else text.add_itxt)(name, info[name])
    return text


# ---- the text that others read -----------------------------------------------------------------------------


def parameters(told: Mapping[str, Any], extra: Mapping[str, Any], seed: int | None) -> str:
    """The `parameters` text that other programs read out of a PNG. `extra`: what a task adds to the settings `told`."""
    values = {**told, "seed": seed, "scheduler": a1111_name(told["scheduler"])}
    if told["clip_skip"]:
        values["clip_skip"] = told["clip_skip"] + 1  # others count the layers from 1
    left_out = [name for name in ("guidance_rescale", "eta", "clip_skip") if not told[name]]
    parts = {label: values[name] for name, label in LABELS.items() if name not in left_out and values[name] is not None}
    parts["Size"] = f"{told['width']}x{told['height']}"
    parts |= {name.replace("_", " ").capitalize(): quoted(str(value)) for name, value in extra.items()}
    parts |= {"Model": quoted(told["model"]), "Version": f"minisd {minisd.__version__}"}
    said = ((name, f"{value:g}" if isinstance(value, float) else value) for name, value in parts.items())
    lines = [told["prompt"], *([f"Negative prompt: {told['negative']}"] if told["negative"] else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in said)])


def quoted(text: str) -> str:
    """`text` as others write it among parameters: as JSON if it has their separators, or surrogates."""
    return text if re.fullmatch(r"[^,:\n\ud800-\udfff]*", text) else json.dumps(text)


# ---- the record that makes it again ------------------------------------------------------------------------


def provenance(sd: Any) -> dict[str, Any]:
    """What decides a picture's bits besides its settings: the weights, the versions, and what computed it."""
    return {
        "minisd": minisd.__version__,
        "torch": torch.__version__,
        "device": sd.device.type,
        "dtype": str(sd.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "model_hash": fingerprint(sd),
    }


def fingerprint(sd: Any) -> str:
    """16 hex digits that tell one set of weights from another: names, shapes, and for each the sum of its bits.

    Every weight is read, at the speed of the memory; the result is kept for as long as no weight is written to.
    """
    state: dict[str, Tensor] = sd.state()
    versions = tuple((weight.data_ptr(), weight._version) for weight in state.values())
    kept = vars(sd).get("_fingerprint")
    if kept is None or kept[0] != versions:
        found = sha256()
        for name, weight in sorted(state.items()):
            bits = weight.detach().contiguous().view(torch.int32 if weight.element_size() == 4 else torch.int16)
            found.update(f"{name} {tuple(weight.shape)} {weight.dtype} {int(bits.sum(dtype=torch.int64))}\n".encode())
        kept = vars(sd)["_fingerprint"] = (versions, found.hexdigest()[:16])
    return str(kept[1])


def sign_all(
    pictures: Sequence[Image.Image], sd: Any, prompt: Texts, sampling: Sampling | None, settings: Mapping[str, Any]
) -> list[Image.Image]:
    """The pictures of `StableDiffusion.text_to_image`, each with the settings of that call."""
    chosen = replace(sampling or Sampling(), **settings)
    steps, scale = chosen.steps_and_scale(sd.generation)
    chosen = replace(chosen, steps=steps, guidance_scale=scale)
    record = call_record(sd, prompt, chosen)
    told = {**vars(chosen), "guidance": scale, "scheduler": scheduler_name(sd, chosen.scheduler)}
    told |= {"model": str(sd.origin.get("source", "unknown"))}
    made: list[Image.Image] = []
    for index, picture in enumerate(pictures):
        place, (width, height) = index // chosen.images_per_prompt, picture.size
        told |= {"prompt": text_at(prompt, place), "negative": text_at(chosen.negative_prompt, place)}
        text = parameters({**told, "width": width, "height": height}, {}, chosen.seed)
        made.append(signed(picture, text, {**record, "index": index}))
    return made


def call_record(sd: Any, prompt: Texts, sampling: Sampling) -> dict[str, Any]:
    """A call of `text_to_image`: its arguments, and under `missing` what no text can hold."""
    given = {"prompt": prompt, **vars(sampling)}
    default = vars(Sampling())
    options = {name: value for name, value in given.items() if writable(value) and value != default.get(name)}
    missing = [name for name, value in given.items() if not writable(value)]
    missing += ["seed"] if sampling.seed is None and sampling.latents is None and sampling.generator is None else []
    missing += ["adapters"] if sd.adapters.loras or sd.adapters.embeddings else []
    return {"call": "text_to_image", "load": sd.origin, "options": options, "missing": missing, **provenance(sd)}


def text_at(texts: Texts, place: int) -> str:
    """One of several prompts, the only one, or "" for context, which is no text."""
    return texts if isinstance(texts, str) else texts[place] if isinstance(texts, list) else ""


def writable(value: Any) -> bool:
    """Whether a setting can be written as JSON, and read back as what it was."""
    try:
        return json.loads(json.dumps(value)) == (list(value) if isinstance(value, tuple) else value)
    except (TypeError, ValueError):
        return False


def scheduler_name(sd: Any, scheduler: Any) -> str:
    """The name of a scheduler given by name, as an object, as "model", or not at all."""
    if scheduler == "model":
        return str(sd.scheduler_config.get("_class_name") or "ddim")
    return scheduler if isinstance(scheduler, str) else type(scheduler).__name__ if scheduler is not None else "ddim"
