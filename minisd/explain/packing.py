"""Tensors and pictures as the page keeps them: bytes between the smallest and the largest value, strips of pictures."""

import base64
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.lab.page import as_data

MAP_SIDE = 32  # of latents: SD 1.5's 64 are averaged over 2x2
PICTURE_SIDE = 128  # pixels of a picture in a strip


def packed(values: Tensor) -> dict[str, Any]:
    """A tensor as bytes: value = low + (high - low) * byte / 255."""
    values = values.detach().float().cpu().nan_to_num()
    low, high = float(values.min()), float(values.max())
    levels = ((values - low) / ((high - low) or 1) * 255).round().byte()
    data = base64.b64encode(levels.contiguous().numpy().tobytes()).decode()
    return {"shape": list(values.shape), "low": low, "high": high, "data": data}


def reduced(maps: Tensor, side: int) -> Tensor:
    """Maps (..., H, W), averaged over squares so that neither side is longer than `side`."""
    factor = -(-max(maps.shape[-2:]) // side)
    if factor == 1:
        return maps
    flat = maps.float().reshape(1, -1, *maps.shape[-2:])  # (1, n, H, W)
    small = F.avg_pool2d(flat, factor, ceil_mode=True)
    return small.reshape(*maps.shape[:-2], *small.shape[-2:])


def strip(pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Pictures of one size side by side in one JPEG, each at most PICTURE_SIDE pixels long."""
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    width, height = small[0].size
    whole = Image.new("RGB", (width * len(small), height))
    for place, picture in enumerate(small):
        whole.paste(picture, (place * width, 0))
    return {"count": len(small), "width": width, "height": height, "image": as_data(whole, "JPEG")}
