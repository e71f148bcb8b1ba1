"""What twins do not have in common: numbers in attributes, weights, the dtype they compute in, their code.

In: twins. Out: lists of `Attribute`, for the report and for the likely cause. Attributes go by several names; where
both modules have the fact, it must be equal.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minisd.lab.hooks import Listener
from minisd.lab.parity.pairing import Twins
from minisd.lab.parity.verdict import ROUNDED, Attribute
from minisd.lab.sources import source_of

# One fact, and the attributes that different authors keep it in.
FACTS: dict[str, tuple[str, ...]] = {
    "eps": ("eps", "variance_epsilon", "layer_norm_eps"),
    "groups": ("num_groups",),
    "heads": ("heads", "num_heads", "num_attention_heads", "n_heads"),
    "scale": ("scale", "scaling"),
    "padding": ("padding",),
    "stride": ("stride",),
    "kernel_size": ("kernel_size",),
    "dilation": ("dilation",),
    "conv_groups": ("groups",),
    "activation": ("activation", "activation_fn", "nonlinearity", "act", "act_fn"),
    "approximate": ("approximate",),
    "output scale": ("output_scale_factor", "rescale_output_factor"),
    "upcast": ("upcast_attention", "upcast_softmax"),
    "sin first": ("flip_sin_to_cos",),
    "frequency shift": ("downscale_freq_shift",),
}
SIMPLE = (bool, int, float, str, tuple, type(None))
CODE = ("forward",)  # what an instance may have replaced


def said(value: Any) -> str:
    """A value as people write it; functions and activation modules by their common name."""
    if isinstance(value, nn.Module):
        return type(value).__name__.lower().removesuffix("activation").replace("quickgelu", "quick_gelu")
    if callable(value):
        return getattr(value, "__name__", type(value).__name__).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(twin: Twins) -> list[Attribute]:
    """Everything that can be seen without running the two modules."""
    return [*facts(twin.a, twin.b), *code(twin.a, twin.b), *weights(twin.a, twin.b)]


def facts(a: nn.Module, b: nn.Module) -> Iterator[Attribute]:
    """Numbers and functions that both modules keep."""
    seen = set()
    for fact, names in FACTS.items():
        values = [next((vars(m)[n] for n in names if n in vars(m)), child(m, names)) for m in (a, b)]
        seen |= set(names)
        if None not in values and said(values[0]) != said(values[1]):
            yield Attribute(fact, said(values[0]), said(values[1]))
    if type(a) is not type(b):
        return
    for name in sorted(vars(a).keys() & vars(b).keys() - seen):
        one, other = vars(a)[name], vars(b)[name]
        if not name.startswith("_") and name != "training" and isinstance(one, SIMPLE) and one != other:
            yield Attribute(name, said(one), said(other))


def child(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """An activation may be a module inside."""
    return next((module._modules[name] for name in names if name in module._modules), None)


def code(a: nn.Module, b: nn.Module) -> Iterator[Attribute]:
    """Code that was replaced on one of two instances of one class."""
    if type(a) is not type(b):
        return
    for name in CODE:
        functions = [getattr(getattr(module, name), "__func__", getattr(module, name)) for module in (a, b)]
        if functions[0] is not functions[1]:
            yield Attribute("code", *(source_of(function) for function in functions))


def weights(a: nn.Module, b: nn.Module) -> Iterator[Attribute]:
    """Parameters of the modules themselves, not of what is inside them."""
    theirs = dict(b.named_parameters(recurse=False))
    for name, one in a.named_parameters(recurse=False):
        other = theirs.pop(name, None)
        if other is None:
            yield Attribute(name, f"of shape {tuple(one.shape)}", "none")
        elif one.numel() != other.numel():
            yield Attribute(name, f"of shape {tuple(one.shape)}", f"of shape {tuple(other.shape)}")
        else:
            yield from weight(name, one.data, other.data.reshape(one.shape))
    for name, other in theirs.items():
        yield Attribute(name, "none", f"of shape {tuple(other.shape)}")


def weight(name: str, one: Tensor, other: Tensor) -> Iterator[Attribute]:
    """How many of two weights' numbers differ, and the largest difference."""
    if one.dtype == other.dtype and torch.equal(one, other):
        return
    gap = (one.double() - other.double()).abs()
    count = int((gap > 0).sum())
    if count == 0:
        return
    rounded = rounding_of(one, other)
    if rounded:
        yield Attribute(name, said(one.dtype), f"{ROUNDED}{rounded}")
        return
    at = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    numbers = [f"{float(tensor[at]):.9g}" for tensor in (one, other)]
    where = f"at {list(at)}, {count:,} of {gap.numel():,} differ, by {float(gap.max()):.3g} at most"
    yield Attribute(name, numbers[0], f"{numbers[1]} ({where})")


def rounding_of(one: Tensor, other: Tensor) -> str:
    """The dtype that makes one weight the other by rounding, or ""."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for finer, coarser in ((one, other), (other, one)):
            rounded = finer.to(dtype)
            if (
                finer.dtype != dtype
                and torch.equal(rounded.double(), coarser.double())
                and looks_rounded(finer, rounded)
            ):
                return str(dtype).removeprefix("torch.")
    return ""


def looks_rounded(finer: Tensor, rounded: Tensor) -> bool:
    """Is what rounding took away spread over all of its range, as it is for numbers that nobody rounded before?

    A reference that was stored in half precision is the rounding of everything near it: one number moved a little, or
    all of them stretched by 1.0001, would pass for it.
    """
    info = torch.finfo(rounded.dtype)
    _, exponent = torch.frexp(rounded.float().abs().clamp(min=info.tiny))
    share = (finer.double() - rounded.double()).abs() / (info.eps * torch.exp2((exponent - 1).double()))  # up to 1/2
    moved = share[share > 0]
    return moved.numel() >= share.numel() / 2 and float(moved.max()) > (0.3 if moved.numel() > 64 else 0.0)


# ---- dtypes ----------------------------------------------------------------------------------------------


class DtypeSpy(TorchFunctionMode):
    """Notes the floating-point dtypes that functions return, for the module that calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[str] = [""]
        self.seen: dict[str, set[str]] = defaultdict(set)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and getattr(func, "__name__", "") != "__get__":
            self.seen[self.inside[-1]].add(str(result.dtype).removeprefix("torch."))
        return result


def computing_dtypes(root: nn.Module, run: Callable[[], Any]) -> dict[str, set[str]]:
    """Path of a module -> the dtypes that its own code computes in, from one run in working precision."""
    spy = DtypeSpy()

    def enters(path: str) -> Callable[..., None]:
        return lambda *_: spy.inside.append(path)

    def leaves(*_: Any) -> None:
        spy.inside.pop()

    with torch.no_grad(), Listener() as listener:
        for path, module in root.named_modules():
            listener.before(module, enters(path))
            listener.after(module, leaves, always=True)
        with spy:
            run()
    return spy.seen


def dtypes_of_twins(
    twins: list[Twins], seen: tuple[Mapping[str, set[str]], Mapping[str, set[str]]]
) -> dict[str, tuple[str, str]]:
    """Name of a pair -> what A and B compute in there: its own code, and that of parts inside without a twin."""
    found: dict[str, list[str]] = {}
    for side, paths in enumerate(([t.a_path for t in twins], [t.b_path for t in twins])):
        owner = {path: twin.name for path, twin in zip(paths, twins, strict=True)}
        charged: dict[str, set[str]] = defaultdict(set)
        for path, dtypes in seen[side].items():
            charged[owner_of(path, owner)] |= dtypes
        for twin in twins:
            found.setdefault(twin.name, ["", ""])[side] = ", ".join(sorted(charged[twin.name]))
    return {name: (both[0], both[1]) for name, both in found.items()}


def owner_of(path: str, owner: Mapping[str, str]) -> str:
    """The twin that stands closest around a module, itself included."""
    while path and path not in owner:
        path = path.rpartition(".")[0]
    return owner.get(path, "")
