"""What a report shows of two tensors that should be equal: where they differ, by how much, how often.

An `Evidence` is an observer of a comparison (`compare(..., observe=evidence)`). Of every pair of modules it keeps the
call in which B is farthest from A, as a few hundred numbers: tensors are not kept.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from minisd.lab.parity.promote import as_written

BINS = 24  # of the histogram: equal, up to 1 unit in the last place, up to 2, 4, 8, ...
WORST = 3  # elements that are listed
HEAT = 12  # rows and columns of a heat map, at most


@dataclass(frozen=True)
class Sight:
    """One call of one module, as the two sides computed it."""

    stage: str
    shape: tuple[int, ...]
    distance: float  # the largest |B64 - A64|; where that is 0, the largest |B - A|
    exact: bool  # is it that of float64?
    histogram: list[int]  # how many elements of B are how many ULPs from A
    worst: list[tuple[tuple[int, ...], float, float, float]]  # where, A, B, A in float64
    heat: list[list[float]]  # the largest distance in each field of the map


@dataclass
class Evidence:
    """Sights by the pair's name, and the images of the whole runs."""

    sights: dict[str, Sight] = field(default_factory=dict)
    pictures: tuple[Tensor, Tensor] | None = None  # (B, 3, H, W) in [-1, 1]

    def __call__(self, name: str, stage: str, a64: Tensor, a: Tensor, b: Tensor, b64: Tensor) -> None:
        """Look at one comparison: A in float64 and in working precision, B likewise."""
        if name == "pixels":
            self.pictures = a.float().cpu(), b.float().cpu()
            return
        if a64.shape == b64.shape and a64.numel():
            with as_written():  # looking is no part of what is compared
                self.look(name, stage, a64, a, b, b64)

    def look(self, name: str, stage: str, a64: Tensor, a: Tensor, b: Tensor, b64: Tensor) -> None:
        """Keep this call if no earlier one of the pair was worse."""
        exact = bool((a64 != b64).any())
        distance = (b64 - a64).abs() if exact else (b.double() - a.double()).abs()
        distance = distance.nan_to_num(nan=float("inf"))
        largest = float(distance.max())
        before = self.sights.get(name)
        if before is None or (exact, largest) > (before.exact, before.distance):
            self.sights[name] = Sight(
                stage=stage,
                shape=tuple(a64.shape),
                distance=largest,
                exact=exact,
                histogram=histogram(a, b),
                worst=worst(distance, a, b, a64),
                heat=heat(distance),
            )


def ulp(x: Tensor) -> Tensor:
    """The distance from each element to the next one that its dtype can hold (a unit in the last place)."""
    info = torch.finfo(x.dtype)
    _, exponent = torch.frexp(x.abs().float().clamp(min=info.tiny))
    return info.eps * torch.exp2((exponent - 1).double())


def histogram(a: Tensor, b: Tensor) -> list[int]:
    """How many elements are 0, up to 1, up to 2, up to 4, ... ULPs apart; the last bin has all the rest."""
    if not (a.is_floating_point() and b.is_floating_point()):
        return []
    apart = (b.double() - a.double()).abs() / ulp(a if a.dtype != torch.float64 else a.float())
    bins = torch.where(apart == 0, 0.0, 1 + apart.clamp(min=1).log2().ceil()).nan_to_num(nan=BINS, posinf=BINS)
    return torch.bincount(bins.clamp(max=BINS - 1).long().flatten(), minlength=BINS).tolist()


def worst(distance: Tensor, a: Tensor, b: Tensor, a64: Tensor) -> list[tuple[tuple[int, ...], float, float, float]]:
    """The elements that are farthest apart, worst first."""
    _, places = distance.flatten().topk(min(WORST, distance.numel()))
    found = []
    for place in places.tolist():
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), distance.shape))
        found.append((index, float(a[index]), float(b[index]), float(a64[index])))
    return found


def heat(distance: Tensor) -> list[list[float]]:
    """The largest distances in a map: height x width of feature maps, positions x channels of sequences."""
    flat = distance.flatten(0, 1).amax(dim=0) if distance.ndim == 4 else distance
    while flat.ndim > 2:
        flat = flat.amax(dim=0)
    flat = flat.reshape(1, -1) if flat.ndim < 2 else flat
    size = tuple(min(HEAT, length) for length in flat.shape)
    return F.adaptive_max_pool2d(flat[None].double().clamp(max=1e300), size)[0].tolist()
