"""Calls of any implementation's modules: the tensors in its arguments and outputs, and how it may fail.

Two implementations of a module pass and return the same tensors in other forms: by name or position, in tuples, dicts
or records, flattened or not. In: arguments or outputs of one. Out: those of the other, or tensors by place.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

KEPT = 1 << 16  # elements of a tensor that B passes to a module and A does not, such as a mask

# What code may raise that was written for other inputs.
FAILURES = (
    RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError, ArithmeticError, OSError,
)  # fmt: skip


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def mapped(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with every object of a type in its tuples, lists and dicts replaced."""
    if isinstance(value, kind):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(kind, function, item) for item in value)
    if type(value) is dict:
        return {key: mapped(kind, function, item) for key, item in value.items()}
    return value


def tensors_in(value: Any, kind: type = Tensor) -> list[Any]:
    """Every tensor in `value`, each once, in order."""
    found: dict[int, Any] = {}
    mapped(kind, lambda one: found.setdefault(id(one), one), value)
    return list(found.values())


def copied(value: Any) -> Any:
    """`value` with tensors of its own, so that code that writes into its arguments changes nobody else's.

    A tensor that occurs twice is one tensor in the copy too.
    """
    copies = {id(tensor): tensor.clone() for tensor in tensors_in(value)}
    return mapped(Tensor, lambda tensor: copies[id(tensor)], value)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A copy of `value` with its floating-point tensors in `dtype`."""
    return mapped(Tensor, lambda t: t.to(dtype, copy=True) if t.is_floating_point() else t.clone(), value)


# ---- outputs ---------------------------------------------------------------------------------------------


def first_tensor(output: Any) -> Tensor:
    """A module's output: a tensor, or the first one of a tuple or of a record. Raises ValueError if there is none."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    for item in items:
        if isinstance(item, Tensor):
            return item
    raise ValueError(f"the output is a {type(output).__name__} without a tensor")


def outputs_of(output: Any, path: str = "") -> dict[str, Tensor]:
    """Place in an output -> the tensor there. Raises ValueError, at the top, if there is none."""
    if isinstance(output, Tensor):
        return {path: as_numbers(output)}
    items: Any = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, tuple | list):
        items = enumerate(output)
    elif is_dataclass(output):
        items = vars(output).items()
    found = {place: tensor for key, item in items for place, tensor in outputs_of(item, f"{path}[{key!r}]").items()}
    if not path and not found:
        raise ValueError(f"the output is a {type(output).__name__} without a tensor")
    return found


def as_numbers(tensor: Tensor) -> Tensor:
    """Sparse, complex and boolean tensors as dense, real and integer ones."""
    if tensor.dtype == torch.bool:
        return tensor.to(torch.int8)
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return torch.view_as_real(dense) if dense.is_complex() else dense


def same_places(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Which tensor of B's output belongs to which of A's: by key, else in order; if they are not as many, the first."""
    if a.keys() == b.keys():
        return [(place, place) for place in a]
    return list(zip(a, b, strict=True)) if len(a) == len(b) else [(next(iter(a)), next(iter(b)))]


def unlike(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """How the form of B's output is not A's, or ""."""
    if len(a) != len(b):
        return f"it returns {len(b)} tensors instead of {len(a)}"
    for place, other in same_places(a, b):
        if a[place].shape != b[other].shape:
            where = f" of {place}" if place else ""
            return f"its shape{where} is {tuple(b[other].shape)} instead of {tuple(a[place].shape)}"
    return ""


# ---- arguments -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of a tensor among arguments. `own` is B's tensor, if it is small: A's call may have no mask."""

    shape: torch.Size
    floating: bool
    own: Tensor | None


@dataclass
class Call:
    """A module's arguments with slots in the place of tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> "Call":
        slots: dict[int, Slot] = {}

        def slot(tensor: Tensor) -> Slot:
            if id(tensor) not in slots:
                small = not tensor.is_floating_point() or tensor.numel() <= KEPT
                own = tensor.clone() if small else None
                slots[id(tensor)] = Slot(tensor.shape, tensor.is_floating_point(), own)
            return slots[id(tensor)]

        return cls(mapped(Tensor, slot, tuple(args)), mapped(Tensor, slot, dict(kwargs)))

    def slots(self) -> list[Slot]:
        return tensors_in((self.args, self.kwargs), Slot)

    def filled(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """B's arguments with A's tensors in them. Raises ValueError where they cannot be matched."""
        chosen = match(self.slots(), tensors)
        args, kwargs = mapped(Slot, lambda slot: chosen[id(slot)], (self.args, self.kwargs))
        return args, kwargs


FITS: tuple[Callable[[Slot, Tensor], bool], ...] = (  # the strictest first
    lambda slot, tensor: tensor.shape == slot.shape,
    lambda slot, tensor: tensor.numel() == slot.shape.numel(),
    lambda slot, tensor: tensor.ndim > 1 and tensor.shape[1:] == slot.shape[1:],
    lambda slot, tensor: tensor.ndim == len(slot.shape) and slot.own is None,
)


def match(slots: list[Slot], tensors: list[Tensor]) -> dict[int, Tensor]:
    """Which tensor of A goes where: by shape, by size, but for the batch, by number of axes, each in order."""
    waiting, chosen = list(tensors), {}
    for slot in slots:
        alike = [tensor for tensor in waiting if tensor.is_floating_point() == slot.floating]
        found = next((tensor for fits in FITS for tensor in alike if fits(slot, tensor)), slot.own)
        if found is None:
            raise ValueError(f"B takes a tensor of shape {tuple(slot.shape)} here, and A has none like it")
        waiting = [tensor for tensor in waiting if tensor is not found]
        chosen[id(slot)] = found.reshape(slot.shape) if found.numel() == slot.shape.numel() else found
    return chosen
