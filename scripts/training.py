"""What the training scripts share: learning rate, checkpoints, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear rise to `peak`, then half a cosine down to a fiftieth of it at step `total` (0-based)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


def save_checkpoint(path: Path, parts: Mapping[str, Any], step: int) -> None:
    """Write the state of every part, and the number of steps done. A crash leaves the old file whole."""
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": step, **state}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(path: Path, parts: Mapping[str, Any]) -> int:
    """Load the state of every part in place; returns how many steps were done, 0 without a checkpoint."""
    if not path.is_file():
        return 0
    saved = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return int(saved["step"])


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a PIL picture."""
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
