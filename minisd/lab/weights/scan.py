"""A look at every value of a file: what is broken, and how large the weights of each block are.

One tensor is in memory at a time.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.checkpoint.hub import sha256
from minisd.checkpoint.values import DTYPES, memory_mapped
from minisd.lab.weights.inspect import Report

SATURATED = 65504.0  # the largest float16: what a careless conversion leaves of anything larger


@dataclass
class Findings:
    """What is wrong with a file's values: names of tensors, by kind. And its sum."""

    nan: list[str]
    infinite: list[str]
    zero: list[str]
    saturated: list[str]
    blocks: dict[str, tuple[float, float]]  # block -> mean and standard deviation of its weights
    sha256: dict[str, str]  # path -> sum


def scan(report: Report) -> Findings:
    """Read every tensor that a report is about."""
    found = Findings([], [], [], [], {}, {})
    sums: dict[str, list[float]] = {}
    for files in report.files:
        blocks = {
            name: ".".join([title, *ours.split(".")[:2]])
            for title, part in report.parts.items()
            if part.files is files
            for ours, name in part.sources.items()
        }
        for path in dict.fromkeys(files.location.values()):
            with memory_mapped(path) as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    tensor = file.get_tensor(name)
                    judge(name, tensor, found)
                    if name in blocks and tensor.is_floating_point():
                        add(sums.setdefault(blocks[name], [0.0, 0.0, 0.0]), tensor)
            found.sha256[str(path)] = sha256(path)
    for block, (count, total, squares) in sums.items():
        mean = total / count
        found.blocks[block] = mean, math.sqrt(max(0.0, squares / count - mean**2))
    return found


def judge(name: str, tensor: Tensor, found: Findings) -> None:
    """Put the tensor's name where it belongs."""
    if tensor.dtype not in DTYPES.values() or not tensor.numel():
        return
    values = tensor.float()
    if values.isnan().any():
        found.nan.append(name)
    if values.isinf().any():
        found.infinite.append(name)
    if not values.any():
        found.zero.append(name)
    if tensor.dtype == torch.float16 and (values.abs() == SATURATED).any():
        found.saturated.append(name)


def add(sums: list[float], tensor: Tensor) -> None:
    """Count, total and squares of the values that are finite."""
    values = tensor.double().flatten()
    values = values[values.isfinite()]
    sums[0] += values.numel() or 1e-300
    sums[1] += float(values.sum())
    sums[2] += float(values.square().sum())


def lines(found: Findings) -> Iterable[str]:
    """The findings for a person."""
    kinds = {
        "NaN": found.nan,
        "infinite": found.infinite,
        "all zero": found.zero,
        "at float16's limit": found.saturated,
    }
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            yield f"  {kind}: {', '.join(names[:3])}{more}"
    if not any(kinds.values()):
        yield "  no NaN, no infinity, no tensor of zeros, nothing at float16's limit"
    for block, (mean, std) in found.blocks.items():
        yield f"  {block:<28} mean {mean:+.5f}  std {std:.5f}"
    for path, digest in found.sha256.items():
        yield f"  sha256 {digest}  {path}"
