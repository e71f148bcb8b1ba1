"""Large pictures through the VAE in tiles: memory grows with a tile, not with the picture.

Tiles overlap by a quarter, and are blended linearly there. Each has its own mean and variance in every GroupNorm, so
the result is not the untiled one. It is that of `enable_vae_tiling` in diffusers, bit for bit.
"""

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 0.25


def in_tiles(network: Callable[[Tensor], Tensor], x: Tensor, side: int, out_side: int) -> Tensor:
    """`network` of `x` (B, C, H, W), by tiles of `side`, of which it makes tiles of `out_side`."""
    if max(x.shape[2:]) <= side:
        return network(x)
    stride, blend = int(side * (1 - OVERLAP)), int(out_side * OVERLAP)
    keep = out_side - blend
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[2], stride):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], stride):
            tile = network(x[:, :, top : top + side, left : left + side])
            if above:
                blend_into(tile, above[len(row)], blend, dim=2)
            if row:
                blend_into(tile, row[-1], blend, dim=3)
            row.append(tile)
        rows.append(torch.cat([tile[:, :, :keep, :keep] for tile in row], dim=3))
        above = row
    return torch.cat(rows, dim=2)


def blend_into(tile: Tensor, before: Tensor, extent: int, dim: int) -> None:
    """Fade from the end of the tile `before` to the start of `tile`, in place, over `extent` rows or columns."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    share = (torch.arange(extent, dtype=torch.float64) / extent).reshape(-1, *[1] * (3 - dim))
    end, start = before.narrow(dim, before.shape[dim] - extent, extent), tile.narrow(dim, 0, extent)
    old, new = (
        (part * weight.to(tile.device, torch.float32)).to(tile.dtype)  # rounded where diffusers rounds
        for part, weight in ((end, 1 - share), (start, share))
    )
    start.copy_(old + new)
