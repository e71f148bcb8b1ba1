"""How a wrong tensor is wrong, in words: a factor, two halves swapped, the border only, one channel, one number.

In: what should be and what is, float64, of one shape. Out: a few words, or "" where nothing simple describes it.
"""

import torch
from torch import Tensor

ALIKE = 1e-9  # relative: float64 with some rounding in it


def describe(right: Tensor, wrong: Tensor) -> str:
    """The simplest description that fits."""
    if right.shape != wrong.shape:
        return f"its shape is {tuple(wrong.shape)} instead of {tuple(right.shape)}"
    right, wrong = right.double(), wrong.double()
    bad = int((~wrong.isfinite() & right.isfinite()).sum())
    if bad:
        return f"{bad:,} of its {wrong.numel():,} numbers are not finite"
    return swapped(right, wrong) or proportional(right, wrong) or local(right, wrong)


def alike(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= ALIKE * one.abs().max())


def swapped(right: Tensor, wrong: Tensor) -> str:
    """Halves along an axis, or channels in reverse."""
    for axis, name in ((-1, "last axis"), (1, "channels"), (0, "batch")):
        if right.ndim > max(axis, 0) and right.shape[axis] % 2 == 0:
            first, second = right.chunk(2, dim=axis)
            if alike(torch.cat([second, first], dim=axis), wrong):
                return f"its two halves are swapped along the {name}"
    return ""


def proportional(right: Tensor, wrong: Tensor) -> str:
    """A factor, or an amount added."""
    size = float((right * right).sum())
    factor = float((right * wrong).sum()) / size if size else 1.0
    if alike(right * factor, wrong) and factor != 0:
        return f"it is {factor:.8g} times what it should be"
    offset = float((wrong - right).mean())
    return f"{offset:+.6g} is added to it" if alike(right + offset, wrong) else ""


def local(right: Tensor, wrong: Tensor) -> str:
    """Where the difference is, if it is not everywhere."""
    off = (right - wrong).abs() > ALIKE * right.abs().max()
    count = int(off.sum())
    if count == 0:
        return ""
    if count == 1:
        return f"one number is off, at {tuple(off.nonzero()[0].tolist())}"
    if right.ndim == 4 and min(right.shape[2:]) > 2 and not off[..., 1:-1, 1:-1].any():
        return "only the border is off"
    for axis, name in enumerate(("sample", "channel" if right.ndim == 4 else "position", "row", "column")):
        if axis < right.ndim and right.shape[axis] > 1:
            where = off.transpose(0, axis).reshape(off.shape[axis], -1).any(dim=1).nonzero().flatten().tolist()
            if len(where) == 1:
                return f"only {name} {where[0]} is off"
    share = count / right.numel()
    return "" if share > 0.5 else f"{share:.1%} of the numbers are off"
