"""The explain page: everything of one generation as numbers, and as one HTML file.

In: a model, a prompt and settings. Out: an `Explanation`. The page itself is `explain.html` beside this file; it draws
what `data` holds, so that `minisd explain --json` tells the same numbers.
"""

import html
import inspect
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageChops
from torch import Tensor

from minisd.explain import causes
from minisd.explain.generation import Generation, blocks, generate, spread
from minisd.explain.packing import MAP_SIDE, packed, reduced, strip
from minisd.files import write_whole
from minisd.lab.page import as_data, environment
from minisd.lab.sources import source_of
from minisd.layers import Attention
from minisd.noise import draw_noise
from minisd.pipeline import StableDiffusion, guide, to_pictures
from minisd.sampling import Sampling
from minisd.tasks.images import mean_latents, psnr
from minisd.tasks.pictures import to_images
from minisd.tokenizer import CLIPTokenizer
from minisd.unet import UNet
from minisd.vae import VAE

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from minisd.sampling import Settings

CURVE = 100  # points of the curve of alpha-bar
SHOWN: dict[str, Any] = {  # panel -> the function that does it
    "tokens": CLIPTokenizer.encode,
    "noise": draw_noise,
    "film": StableDiffusion.denoise,
    "guidance": guide,
    "attention": Attention.forward,
    "unet": UNet.forward,
    "vae": VAE.decode,
    "compare": StableDiffusion.make_scheduler,
}


@dataclass(frozen=True)
class Explanation:
    """One generation from the inside: its numbers in `data`, its page in `html`. A notebook shows the page."""

    data: dict[str, Any]
    picture: Image.Image

    @property
    def html(self) -> str:
        """The page: one file that asks no network for anything."""
        return environment().get_template("explain/explain.html").render(data=self.data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page, whole or not at all."""
        write_whole(Path(os.path.expanduser(path)), self.html.encode())

    def _repr_html_(self) -> str:
        page = html.escape(self.html, quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 85vh; border: 0" title="explain"></iframe>'


def explain(
    sd: StableDiffusion,
    prompt: str,
    *,
    versus: Mapping[str, Any] | None = None,
    what_if: bool = True,
    **settings: "Unpack[Settings]",
) -> Explanation:
    """Generate an image of `prompt`, and show how it came about.

    `versus`: what another run has otherwise, which is compared: prompt, model, or settings by name. `what_if=False`
    leaves out the runs without a word, without a block, and with other guidance. `settings`: those of `Sampling`, for
    one image; without a seed one is drawn. Raises ValueError for a setting that is impossible, or an empty prompt.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("prompt: is empty; there is nothing to explain: say what to generate")
    began, sampling = time.perf_counter(), Sampling(**settings)
    if sampling.images_per_prompt != 1 or sampling.generator is not None or sampling.predict_noise is not None:
        raise ValueError("explain: one image from a seed; images_per_prompt, generator and predict_noise do not fit")
    if strange := sorted(set(versus or ()) - {*vars(sampling), "prompt", "model"}):
        raise ValueError(f"versus: {', '.join(strange)} cannot be compared here")
    sampling = replace(sampling, seed=secrets.randbelow(2**32) if sampling.seed is None else sampling.seed)
    found = generate(sd, prompt, sampling)
    data = {**overview(found), **inside(found), "vae": round_trip(found), "compare": None, "words": None}
    data |= {
        "guidance": None,
        "block_pictures": None,
        "sources": {panel: source(made) for panel, made in SHOWN.items()},
    }
    if what_if:
        data |= what_ifs(found, data["blocks"])
    if versus:
        data["compare"] = comparison(found, versus)
    data["seconds"] = round(time.perf_counter() - began, 2)
    return Explanation(data, found.picture)


def source(function: Callable[..., Any]) -> dict[str, str]:
    """A function's name, its file and line, and its lines."""
    function = inspect.unwrap(function)
    return {"name": function.__qualname__, "place": source_of(function), "lines": inspect.getsource(function)}


# ---- what the run itself shows ---------------------------------------------------------------------------------


def overview(found: Generation) -> dict[str, Any]:
    """The prompt's tokens, the settings, and the film: latents, predictions, previews, the schedule."""
    sd, steps = found.sd, found.steps
    alphas = sd.make_scheduler(found.sampling.scheduler, found.count).alphas_cumprod
    latents = torch.cat([found.noise, *(step.latents for step in steps)])  # (steps + 1, 4, h, w)
    x0 = torch.cat([step.x0 for step in steps])
    predictions = {name: torch.stack(rows) for name, rows in found.predictions.items()}
    return {
        "prompt": found.prompt,
        "settings": {**causes.settings_of(found.sampling), "model": str(sd.origin.get("source", "?"))},
        "scale": found.scale,
        "tokens": tokens(found),
        "timesteps": [step.timestep for step in steps],
        "alphas": [float(alphas[step.timestep]) for step in steps],
        "curve": [float(alphas[place]) for place in spread(len(alphas), CURVE)],
        "latents": packed(reduced(latents, MAP_SIDE)),
        "predictions": {name: packed(reduced(rows, MAP_SIDE)) for name, rows in predictions.items()},
        "norms": {"latents": norms(latents[:-1]), "noise": norms(predictions["guided"]), "x0": norms(x0)},
        "plane": plane(predictions),
        "previews": strip(found.previews),
        "picture": as_data(found.picture),
        "reduced": reductions(found),
    }


def norms(tensors: Tensor) -> list[float]:
    """Root mean square of each."""
    return [float(tensor.float().square().mean().sqrt()) for tensor in tensors]


def tokens(found: Generation) -> dict[str, Any]:
    """Pieces and ids, and what did not fit into the context."""
    tokenizer = found.sd.tokenizer
    ids, most = tokenizer.ids(found.prompt), tokenizer.context_length - 2
    pieces = tokenizer.tokens(found.prompt)
    kept = tokenizer.kept(found.prompt)
    return {
        "pieces": [[text.replace("</w>", " "), number] for text, number in zip(pieces, kept, strict=True)],
        "places": tokenizer.context_length,
        "known": len(tokenizer.vocabulary),
        "cut": tokenizer.decode(ids[most:]) if len(ids) > most else "",
    }


def plane(predictions: Mapping[str, Tensor]) -> list[list[list[float]]]:
    """Each step's unconditional, conditional and guided prediction as points of the plane in which all three lie.

    The first axis points along the unconditional one. Units: the root mean square of a prediction.
    """
    if "negative" not in predictions:
        return []
    rows = []
    size = predictions["negative"][0].numel() ** 0.5
    for triple in zip(*(predictions[name].flatten(1) for name in ("negative", "positive", "guided")), strict=True):
        negative, positive, _ = triple
        along = negative / negative.norm()
        across = positive - (positive @ along) * along
        across = across / across.norm() if across.norm() > 0 else across
        rows.append([[float(one @ along) / size, float(one @ across) / size] for one in triple])
    return rows


def reductions(found: Generation) -> list[str]:
    """What the page shows less of than there is."""
    said = []
    side = max(found.noise.shape[2:])
    if side > MAP_SIDE:
        said.append(f"maps of latents are averages: {side} positions a side, at most {MAP_SIDE} shown")
    if len(found.attention_steps) < found.count:
        said.append(f"attention is kept for {len(found.attention_steps)} of {found.count} steps")
    if len(found.pieces) < len(found.sd.tokenizer.tokens(found.prompt)):
        said.append(f"attention is shown for the first {len(found.pieces)} tokens")
    if found.picture.width > 128:
        said.append("pictures in strips are 128 pixels wide")
    return said


def inside(found: Generation) -> dict[str, Any]:
    """Attention and feature maps, and the table of the UNet's blocks."""
    layers = [
        {"name": name.removesuffix(".cross_attn.probabilities"), "maps": packed(torch.stack(list(steps.values())))}
        for name, steps in found.attention.items()
    ]
    features = {name: packed(torch.stack(list(steps.values()))) for name, steps in found.features.items()}
    kept = next(iter(found.features.values()))
    return {
        "attention": {"pieces": found.pieces, "steps": found.attention_steps, "layers": layers},
        "features": {"steps": list(kept), "maps": features},
        "blocks": [row(found, name, block) for name, block in blocks(found.sd).items()],
    }


def row(found: Generation, name: str, block: Any) -> dict[str, Any]:
    """A block of the UNet in numbers."""
    parts = [part for part in ("resnet", "attention", "downsample", "upsample") if getattr(block, part) is not None]
    channels, height, width = found.shapes[name]
    return {
        "name": name.removeprefix("unet."),
        "parts": ", ".join(parts),
        "channels": channels,
        "size": f"{width}x{height}",
        "parameters": sum(weight.numel() for weight in block.parameters()),
        "milliseconds": round(1000 * found.seconds[name] / found.count, 2),
    }


@torch.no_grad()
def round_trip(found: Generation) -> dict[str, Any]:
    """The picture through the VAE once more: encoded, decoded, and what is lost."""
    picture = found.picture
    latents = mean_latents(found.sd, to_images([picture], picture.height, picture.width))
    (back,) = to_pictures(found.sd.decode(latents))
    return {"psnr": psnr(picture, back), "pictures": strip([picture, back, enlarged(picture, back)])}


def enlarged(one: Image.Image, other: Image.Image) -> Image.Image:
    """The difference of two pictures, four times as large."""
    return ImageChops.difference(one, other).point(lambda level: min(255, 4 * level))


# ---- what other runs show --------------------------------------------------------------------------------------


def what_ifs(found: Generation, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs with one thing changed; a block's distance is added to its row."""
    plain, words = causes.without_words(found)
    without = {change.name.removeprefix("unet."): change for change in causes.without_blocks(found)}
    for place, (name, change) in enumerate(without.items()):
        next(row for row in rows if row["name"] == name).update(psnr=change.psnr, place=place)
    guidance = [{"share": row["share"], "pictures": strip(row["pictures"])} for row in causes.other_guidance(found)]
    differences = [enlarged(plain, change.picture) for change in words]
    return {
        "words": {
            "steps": min(causes.FEW, found.count),
            "changes": [{"name": change.name, "psnr": change.psnr} for change in words],
            "pictures": strip([plain, *(change.picture for change in words)]),
            "differences": strip(differences) if differences else None,
        },
        "guidance": {"values": causes.guidance_values(found.scale), "rows": guidance},
        "block_pictures": {"steps": min(causes.FEWER, found.count)}
        | strip([change.picture for change in without.values()]),
    }


def comparison(found: Generation, versus: Mapping[str, Any]) -> dict[str, Any]:
    """Another run beside this one, and where the two part."""
    changes = dict(versus)
    prompt, model = changes.pop("prompt", found.prompt), changes.pop("model", None)
    sd = found.sd if model is None else StableDiffusion.load(model, device=found.sd.device, dtype=found.sd.dtype)
    steps = list(sd.denoise(prompt, replace(found.sampling, **changes)))
    distances, first = causes.parting(found.steps, steps)
    ours, theirs = (spread(len(run), 6) for run in (found.steps, steps))
    with torch.no_grad():
        other = [to_pictures(sd.decode(steps[place].x0))[0] for place in theirs[:-1]]
        other += to_pictures(sd.decode(steps[-1].latents))
    mine: Sequence[Image.Image] = [*(found.previews[place] for place in ours[:-1]), found.picture]
    return {
        "versus": {name: str(value) for name, value in versus.items()},
        "distances": [round(distance, 6) for distance in distances],
        "parts_at": first,
        "limit": causes.APART,
        "ours": {**strip(mine), "steps": ours},
        "theirs": {**strip(other), "steps": theirs},
    }
