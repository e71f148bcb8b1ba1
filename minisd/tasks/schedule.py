"""Schedules made visible: how fast the signal drowns, and which timesteps are visited.

In: schedulers. Out: a PNG, or the same as text. Two curves over the timesteps: alpha_bar (how much of a sample's
variance is signal; 1 clean, 0 noise) and the signal-to-noise ratio alpha_bar / (1 - alpha_bar) in dB. Below them a row
of ticks for each spacing: the timesteps that N steps visit (Lin et al. 2023, arXiv:2305.08891, table 2).
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from minisd.schedulers import Scheduler, named

SPACINGS = ("leading", "trailing", "linspace")
LOWEST = -60.0  # dB: zero terminal SNR would be infinitely low


def read_changes(changes: tuple[str, ...]) -> dict[str, Any]:
    """("beta_end=0.02", "timestep_spacing=trailing") -> arguments; a value is JSON, or else text. Raises ValueError."""
    found = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not name or not equals:
            raise ValueError(f"--set {change}: must be NAME=VALUE, such as timestep_spacing=trailing")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = {"True": True, "False": False, "None": None}.get(value, value)
    return found


def make_scheduler(config: Mapping[str, Any], kind: str, changes: Mapping[str, Any]) -> Scheduler:
    """A scheduler from a model's `config` with `changes`. Raises ValueError for a change that it does not know."""
    found, arguments = named(kind)
    scheduler: Scheduler = found.from_config({**config, **changes}, **arguments)
    unknown = [name for name in changes if name not in vars(scheduler)]
    if unknown:
        raise ValueError(f"--set {unknown[0]}: {kind} has no such setting; it has {', '.join(scheduler.config)}")
    return scheduler


def snr_decibel(alphas_cumprod: Tensor) -> Tensor:
    """10 log10 of the signal-to-noise ratio, (T,), not below LOWEST."""
    ratio = alphas_cumprod.double() / (1 - alphas_cumprod.double())
    return (10 * torch.log10(ratio)).clamp(min=LOWEST)


def visited(scheduler: Scheduler, steps: int) -> dict[str, list[int]]:
    """Spacing -> the timesteps of `steps` steps, falling: all three, side by side."""
    found = {}
    for spacing in SPACINGS:
        twin = type(scheduler).from_config(scheduler.config, timestep_spacing=spacing)
        twin.set_timesteps(steps)
        found[spacing] = twin.timesteps.tolist()
    return found


def as_text(scheduler: Scheduler, steps: int, width: int = 72, height: int = 12) -> str:
    """Both curves and the three rows of ticks, for a terminal."""
    curves = {
        "alpha_bar": (scheduler.alphas_cumprod.double(), "{:5.2f}"),
        "SNR in dB": (snr_decibel(scheduler.alphas_cumprod), "{:5.0f}"),
    }
    lines: list[str] = []
    for name, (values, form) in curves.items():
        lines += [f"{name} over timesteps 0 to {len(values) - 1}", *text_curve(values, form, width, height), ""]
    chosen = scheduler.config["timestep_spacing"]
    for spacing, timesteps in visited(scheduler, steps).items():
        columns = {max(t, 0) * (width - 1) // max(len(scheduler) - 1, 1) for t in timesteps}
        ticks = "".join("|" if column in columns else "-" for column in range(width))
        mark = "*" if spacing == chosen else " "
        lines.append(f"{spacing:>8}{mark}{ticks}  {timesteps[0]} ... {timesteps[-1]}")
    return "\n".join(lines)


def text_curve(values: Tensor, form: str, width: int, height: int) -> list[str]:
    """Values (T,) -> `height` lines of `width` columns, the largest value on top."""
    low, high = float(values.min()), float(values.max())
    samples = values[torch.linspace(0, len(values) - 1, width).round().long()]
    rows = ((high - samples) / ((high - low) or 1) * (height - 1)).round().int().tolist()
    lines = []
    for row in range(height):
        label = form.format(high - (high - low) * row / (height - 1))
        lines.append(f"{label:>8} " + "".join("*" if rows[column] == row else " " for column in range(width)).rstrip())
    return lines


def as_picture(scheduler: Scheduler, steps: int, width: int = 960) -> Image.Image:
    """The same as a picture: curves in two panels, with the chosen timesteps as dots, and three rows of ticks."""
    panel, row, left, right = 200, 30, 90, 20
    picture = Image.new("RGB", (width, 2 * (panel + 40) + 3 * row + 60), "white")
    draw = ImageDraw.Draw(picture)
    last, chosen = max(len(scheduler) - 1, 1), visited(scheduler, steps)
    own = chosen[scheduler.config["timestep_spacing"]]

    def across(t: int) -> float:
        return left + max(t, 0) / last * (width - left - right)

    curves = {"alpha_bar": scheduler.alphas_cumprod.double(), "SNR in dB": snr_decibel(scheduler.alphas_cumprod)}
    for place, (name, values) in enumerate(curves.items()):
        top = place * (panel + 40) + 30
        low, high = float(values.min()), float(values.max())
        heights = (top + (high - values) / ((high - low) or 1) * panel).tolist()
        draw.rectangle([left, top, width - right, top + panel], outline="#bbbbbb")
        draw.text((left, top - 18), f"{name}, timestep 0 to {last}", fill="black")
        draw.text((8, top - 5), f"{high:.3g}", fill="black")
        draw.text((8, top + panel - 8), f"{low:.3g}", fill="black")
        draw.line([(across(t), y) for t, y in enumerate(heights)], fill="#2060c0", width=2)
        for t in own:
            x, y = across(t), heights[max(t, 0)]
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill="#d04020")
    for place, (spacing, timesteps) in enumerate(chosen.items()):
        y = 2 * (panel + 40) + 40 + place * row
        draw.text((8, y - 6), spacing, fill="#d04020" if timesteps is own else "black")
        draw.line([left, y, width - right, y], fill="#bbbbbb")
        for t in timesteps:
            draw.line([across(t), y - 9, across(t), y + 9], fill="#d04020" if timesteps is own else "#2060c0", width=2)
    draw.text((left, picture.height - 20), f"{steps} steps, side by side; * or red is the one chosen", fill="black")
    return picture
