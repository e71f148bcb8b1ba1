"""A side's name -> the side, and two sides -> the comparison that fits them.

    verdict = compare("diffusers:weights/emoji", "minisd:weights/emoji")

Names: `minisd:PATH`, `diffusers:PATH`, `trace:FILE.safetensors`, `python:package.module:function`; a path may end in
@float16 or @bfloat16, the precision to work in. Bad names, and pairs that cannot be compared, are ValueErrors that say
what to do.
"""

import importlib
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from minisd.lab.parity.against_trace import compare_with_trace, is_result
from minisd.lab.parity.cases import Case
from minisd.lab.parity.compare import Progress, compare_part, compare_pipelines
from minisd.lab.parity.memory import check_memory
from minisd.lab.parity.promote import float64
from minisd.lab.parity.shadow import Observer, one_line
from minisd.lab.parity.sides import PipelineSide, Side, diffusers_side, minisd_side
from minisd.lab.parity.traces import TraceSide, inputs_of, narrowed, read
from minisd.lab.parity.verdict import Verdict

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = "minisd:PATH, diffusers:PATH, trace:FILE.safetensors or python:package.module:function"


@dataclass
class PartSide(Side):
    """A module of somebody's own. `names`: its own paths -> names in any dialect, "" being the whole of it."""

    name: str
    module: nn.Module
    names: Mapping[str, str] = field(default_factory=dict)


@dataclass
class FunctionSide(Side):
    """A function from named inputs to named tensors, as in a trace."""

    name: str
    function: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def open_side(name: str) -> Side:
    """Raises ValueError, CheckpointError or FileNotFoundError."""
    kind, colon, rest = name.partition(":")
    if not colon or not rest or kind not in ("minisd", "diffusers", "trace", "python"):
        raise ValueError(f"{name!r} is not a side to compare: must be {KINDS}")
    if kind == "trace":
        return read(rest, name)
    if kind == "python":
        return python_side(rest, name)
    path, _, dtype = rest.rpartition("@") if rest.rpartition("@")[2] in DTYPES else (rest, "", "float32")
    make: Callable[..., Side] = minisd_side if kind == "minisd" else diffusers_side
    return make(os.path.expanduser(path), name, DTYPES[dtype])


def python_side(place: str, name: str) -> Side:
    """Import a function: without parameters it makes a module, with one it computes tensors from tensors."""
    module_name, _, function_name = place.rpartition(":")
    if not module_name:
        raise ValueError(f"{name}: must be python:package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    with foreign(f"{name}: cannot be imported"):
        function = getattr(importlib.import_module(module_name), function_name)
    if isinstance(function, nn.Module):
        return part(name, function)
    if not callable(function):
        raise ValueError(f"{name}: is a {type(function).__name__}, not a function")
    needed = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty]
    if needed:
        return FunctionSide(name, function)
    with foreign(f"{name}: fails"):
        made = function()
    return part(name, made)


@contextmanager
def foreign(failing: str) -> Iterator[None]:
    """Around code of somebody else's: whatever ends it is a ValueError, and what it prints is no part of the result."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        raise ValueError(f"{failing} (it calls sys.exit({error.code!r}))") from None
    except Exception as error:
        raise ValueError(f"{failing} ({type(error).__name__}: {one_line(error)})") from None


def part(name: str, made: Any) -> PartSide:
    """A module, or (module, names). The names may be on the module as `parity_names`."""
    module, names = made if isinstance(made, tuple) and len(made) == 2 else (made, getattr(made, "parity_names", None))
    if not isinstance(module, nn.Module) or not isinstance(names, Mapping) or "" not in names:
        raise ValueError(
            f"{name}: must return (module, names), names from its own module paths to minisd's, diffusers' or "
            'CompVis\' ("" is the module itself, such as {"": "unet.down.0.resnet"})'
        )
    return PartSide(name, module, names)


def compare(
    a: str | Side,
    b: str | Side,
    case: Case | Mapping[str, Any] | None = None,
    *,
    observe: Observer | None = None,
    progress: Progress = lambda _: None,
) -> Verdict:
    """Compare two sides. `case`: a `Case`, or the numbers of one that are not to be the default; a trace has its own.

    `observe` is given every tensor that is compared, `progress` what is at work. Raises ValueError for sides that
    cannot be compared, MemoryError (before anything is computed) where the machine is too small.
    """
    one, other = (open_side(side) if isinstance(side, str) else side for side in (a, b))
    verdict = dispatch(one, other, case, observe, progress)
    verdict.command = command_for(
        one.name, other.name, verdict, isinstance(one, TraceSide) or isinstance(other, TraceSide)
    )
    return verdict


def dispatch(one: Side, other: Side, case: Any, observe: Observer | None, progress: Progress) -> Verdict:
    if isinstance(one, PipelineSide) and isinstance(other, PipelineSide):
        check_shapes(one, other)
        fitting = case_for(one, case)
        check_memory(one, other, fitting)
        return compare_pipelines(one, other, fitting, observe=observe, progress=progress)
    live = next((side for side in (one, other) if isinstance(side, PipelineSide)), None)
    if live is None:
        raise ValueError(f"{one.name} and {other.name}: one of the two must be minisd:PATH or diffusers:PATH")
    guest = other if live is one else one
    if isinstance(guest, TraceSide):
        return compare_with_trace(guest, live, trace_is_a=guest is one)
    if isinstance(guest, FunctionSide):
        return compare_with_trace(called(guest, live, case_for(live, case)), live, trace_is_a=guest is one)
    assert isinstance(guest, PartSide)
    with redirect_stdout(sys.stderr):
        try:
            return compare_part(live, guest, case_for(live, case), observe=observe, progress=progress)
        except (SystemExit, ArithmeticError, OSError) as error:  # others it counts as findings
            raise ValueError(f"{guest.name}: ends with {type(error).__name__} ({one_line(error)})") from None


def case_for(side: PipelineSide, case: Case | Mapping[str, Any] | None) -> Case:
    """The case that was given, or one of a size that fits the model."""
    if isinstance(case, Case):
        return case
    return Case.fitting(side.config.unet.sample_size, side.factor, **(case or {}))


def called(side: FunctionSide, live: PipelineSide, case: Case) -> TraceSide:
    """What a function says, in the live side's precision and in float64, as a trace. Raises ValueError if it fails."""
    inputs = inputs_of(live, case)
    working = narrowed(inputs, live.dtype)
    with foreign(f"{side.name}: fails; it was given {', '.join(sorted(inputs)[:5])} ..."):
        told = side.function(working)
        with float64():
            exactly = side.function(inputs)
    check_answer(side, told)
    check_answer(side, exactly)
    if not any(is_result(name) for name in told):
        raise ValueError(f"{side.name}: none of the names it returns ({', '.join(sorted(told)[:4])}) is one of a trace")
    wide = {name: tensor for name, tensor in exactly.items() if tensor.dtype == torch.float64}
    return TraceSide(side.name, case, {**working, **told}, {**inputs, **wide} if wide else {})


def check_answer(side: FunctionSide, told: Any) -> None:
    """Raise ValueError for anything but tensors by name."""
    must = "must be a dict from names, as in a trace, to torch tensors"
    if not isinstance(told, Mapping):
        raise ValueError(f"{side.name}: returns a {type(told).__name__}; {must}")
    for name, value in told.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{side.name}: returns a {type(value).__name__} as {name!r}; {must}")


SHAPES = {
    "unet": ("in_channels", "out_channels", "widths", "attention", "resnets_per_level", "context_width"),
    "vae": ("image_channels", "latent_channels", "widths", "resnets_per_level"),
    "text_encoder": ("vocabulary", "context_length", "width", "layers", "hidden_width"),
}


def check_shapes(a: PipelineSide, b: PipelineSide) -> None:
    """Raise ValueError for two models of which one's weights cannot be the other's."""
    for component, names in SHAPES.items():
        for name in names:
            one, other = (getattr(getattr(side.config, component), name) for side in (a, b))
            if one != other:
                raise ValueError(f"{component}: {name} is {one} in A and {other} in B: shapes that cannot be paired")


def command_for(a: str, b: str, verdict: Verdict, own_case: bool) -> str:
    """What to type to see this again."""
    words = ["minisd", "parity", a, b]
    default = Case().as_dict()
    for name in () if own_case else ("steps", "guidance", "seed"):
        if verdict.case.get(name, default[name]) != default[name]:
            words += [f"--{name}", f"{verdict.case[name]:g}"]
    if not own_case and verdict.case:
        words += ["--size", f"{verdict.case['width']}x{verdict.case['height']}"]
        for name, option in (("prompts", "--prompt"), ("negatives", "--negative")):
            if verdict.case[name] != default[name]:
                words += [word for text in verdict.case[name] for word in (option, text)]
    return shlex.join(words)
