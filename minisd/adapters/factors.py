"""What stands beside a layer while a LoRA is loaded: y = layer(x) + scale * path(x). The layer itself is untouched.

Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) says that what fine-tuning changes in a matrix has few
dimensions: up (out, r) times down (r, in), with r of 4 to 128. A convolution is the same with a kernel in `down`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor, nn


@dataclass(frozen=True)
class LowRank:
    """up(down(x)); or up(mid(down(x))), where the kernel is in the middle (Tucker decomposition, as LyCORIS writes it).

    Matrices for a linear layer: down (r, in), up (out, r). Kernels for a convolution: down (r, in, h, w),
    up (out, r, 1, 1); with a mid (r, r, h, w), down is (r, in, 1, 1).
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None = None

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(layer, nn.Conv2d):
            return F.linear(F.linear(x, self.down), self.up)
        if self.mid is None:
            return F.conv2d(convolve(layer, x, self.down), self.up)
        return F.conv2d(convolve(layer, F.conv2d(x, self.down), self.mid), self.up)

    def product(self) -> Tensor:
        """The change of the layer's weight, in its shape."""
        if self.down.ndim == 2:
            return self.up @ self.down
        up = self.up[:, :, 0, 0]
        if self.mid is None:
            return einsum(up, self.down, "o r, r i h w -> o i h w")
        return tucker(self.mid, up, self.down[:, :, 0, 0])

    def to(self, like: Tensor) -> "LowRank":
        """On the device and in the dtype of a weight."""
        mid = None if self.mid is None else self.mid.to(like)
        return LowRank(self.down.to(like), self.up.to(like), mid)


@dataclass(frozen=True)
class Whole:
    """A change given as a whole weight: what LoHa and LoKr multiply out to."""

    weight: Tensor

    def __call__(self, layer: nn.Module, x: Tensor) -> Tensor:
        return convolve(layer, x, self.weight) if isinstance(layer, nn.Conv2d) else F.linear(x, self.weight)

    def product(self) -> Tensor:
        """The change of the layer's weight, in its shape."""
        return self.weight

    def to(self, like: Tensor) -> "Whole":
        """On the device and in the dtype of a weight."""
        return Whole(self.weight.to(like))


Path = LowRank | Whole


def convolve(layer: nn.Conv2d, x: Tensor, kernel: Tensor) -> Tensor:
    """The layer's convolution with another kernel and without bias."""
    return F.conv2d(x, kernel, stride=layer.stride, padding=layer.padding)


def tucker(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """core (p, r, h, w), left (out, p), right (r, in) -> (out, in, h, w)."""
    return einsum(core, left, right, "p r h w, o p, r i -> o i h w")


# ---- the two other products that LyCORIS trains (Yeh et al. 2023, arXiv:2309.14859) ------------------------


def hadamard(parts: Mapping[str, Tensor]) -> Tensor:
    """LoHa: two low-rank matrices, multiplied element by element."""
    return factor(parts, "hada_w1", "hada_t1") * factor(parts, "hada_w2", "hada_t2")


def kronecker(parts: Mapping[str, Tensor]) -> Tensor:
    """LoKr: a small matrix whose every element scales a copy of another; each may be low-rank itself."""
    one, other = factor(parts, "lokr_w1", "lokr_t1"), factor(parts, "lokr_w2", "lokr_t2")
    # `kron` views its operands, and a product around a core is not contiguous.
    return torch.kron(one.reshape(*one.shape, *[1] * (other.ndim - one.ndim)).contiguous(), other.contiguous())


def factor(parts: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """One side of either product: a matrix as it is, a pair (a times b), or a pair around a core."""
    if name in parts:
        return parts[name]
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    if core not in parts:
        return a @ b.flatten(1)
    return tucker(parts[core], a.T, b)


Shape = tuple[int, ...]


def hadamard_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of a LoHa's change, from those of its factors; None where they do not fit each other."""
    one, other = factor_shape(shapes, "hada_w1", "hada_t1"), factor_shape(shapes, "hada_w2", "hada_t2")
    return one if one == other else None


def kronecker_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """The same of a LoKr's."""
    one, other = factor_shape(shapes, "lokr_w1", "lokr_t1"), factor_shape(shapes, "lokr_w2", "lokr_t2")
    if one is None or other is None or len(one) > len(other):
        return None
    return tuple(a * b for a, b in zip((*one, *[1] * (len(other) - len(one))), other, strict=True))


def factor_shape(shapes: Mapping[str, Shape], name: str, core: str) -> Shape | None:
    """The shape of `factor`."""
    if name in shapes:
        return shapes[name] if len(shapes[name]) >= 2 else None
    a, b, t = shapes.get(f"{name}_a", ()), shapes.get(f"{name}_b", ()), shapes.get(core)
    if len(a) != 2 or len(b) < 2 or 0 in (*a, *b):
        return None
    if t is None:
        return (a[0], math.prod(b[1:])) if a[1] == b[0] else None
    return (a[1], b[1], *t[2:]) if len(t) == 4 and len(b) == 2 and t[:2] == (a[0], b[0]) else None


# ---- DoRA ------------------------------------------------------------------------------------------------


def lengths(weight: Tensor, magnitude: Tensor) -> Tensor:
    """The Euclidean lengths that `magnitude` replaces: along all axes on which it has size 1."""
    axes = [axis for axis, size in enumerate(magnitude.shape) if size == 1 and weight.shape[axis] > 1]
    return torch.linalg.vector_norm(weight, dim=axes, keepdim=True)


def stretch(weight: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA (Liu et al. 2024, arXiv:2402.09353): times this, `weight` keeps its direction and has the learnt length."""
    return magnitude / lengths(weight, magnitude)


# ---- beside the layer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beside:
    """A forward hook: `layer.register_forward_hook(Beside(path, scale))`."""

    path: Path
    scale: float

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.path(layer, inputs[0]) * self.scale  # in PEFT's order: its roundings are part of parity


@dataclass(frozen=True)
class BesideWithMagnitude:
    """DoRA's hook. Its lengths are those of the layer's weight with this change alone, and the bias has no length.

    What other LoRAs added to the output before is stretched along, as PEFT does it: there the order counts.
    """

    path: Path
    scale: float
    magnitude: Tensor  # (out, 1) or (out, 1, 1, 1)

    def __call__(self, layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        share = stretch(layer.weight + self.scale * self.path.product(), self.magnitude)
        share = share.reshape(-1) if output.ndim != 4 else share.reshape(1, -1, 1, 1)
        bias = layer.bias if layer.bias is None or output.ndim != 4 else layer.bias.reshape(1, -1, 1, 1)
        bare = output if bias is None else output - bias
        return output + ((share - 1) * bare + share * self.path(layer, inputs[0]) * self.scale)


def checked_scale(scale: float) -> float:
    """`scale` if it is a number. Raises ValueError otherwise."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale={scale!r}: must be a finite number; 1 is the LoRA as it was trained")
    return float(scale)
