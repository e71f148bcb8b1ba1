"""Run any code in float64, whatever dtype its author wrote down.

    with float64():
        context = sd.text_encoder(sd.tokenizer(["red heart"]))  # float64, though the weights are float32

`.double()` on a module is not enough: code with a hard-coded float32 (the sinusoidal embedding, say) would go on
rounding there, and a correct implementation would look wrong. Under `float64` every operation gets its floating-point
arguments in float64, and every dtype that is asked for becomes float64. Weights stay as they are and are widened at
the operation that reads them, so that a network needs no second copy in memory.

In: any torch code. Out: what it would compute if rounding were 2**-53. Next: `pairing.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}


def widened(value: Any) -> Any:
    """`value` with every narrow floating-point tensor and dtype in it made float64."""
    if isinstance(value, Tensor):
        return value.to(torch.float64) if value.dtype in NARROW else value
    kind = type(value)
    if kind is torch.dtype:
        return torch.float64 if value in NARROW else value
    if kind is tuple or kind is list:
        return kind(map(widened, value))
    if kind is dict:
        return {key: widened(item) for key, item in value.items()}
    return value


IN_PLACE = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"})


def works_in_place(name: str) -> bool:
    """Whether a function writes into its first argument, which must then be the tensor itself and not a copy."""
    return name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))


class Promotion(TorchFunctionMode):
    """Float64 for every function call while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.active = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self.active or name in ("__get__", "__set__"):
            return func(*args, **kwargs)
        if func in CASTS:
            return widened(args[0]) if args[0].is_floating_point() else args[0].double()
        wide = tuple(map(widened, args))
        named = {key: value if key == "out" else widened(value) for key, value in kwargs.items()}
        if args and works_in_place(name):
            return func(args[0], *wide[1:], **named)
        return widened(func(*wide, **named))


_running: list[Promotion] = []  # the modes that are on now, innermost last


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def float64() -> Iterator[None]:
    """Everything inside computes in float64, and numbers that are made inside are float64."""
    mode = Promotion()
    _running.append(mode)
    try:
        with default_dtype(torch.float64), mode:
            yield
    finally:
        _running.remove(mode)


@contextmanager
def as_written() -> Iterator[None]:
    """Inside `float64`, a stretch of code that computes in the dtypes that its author chose."""
    paused = [mode for mode in _running if mode.active]
    for mode in paused:
        mode.active = False
    try:
        with default_dtype(torch.float32):
            yield
    finally:
        for mode in paused:
            mode.active = True
