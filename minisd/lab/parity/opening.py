"""A side's name -> the side.

    minisd:PATH   diffusers:PATH   python:package.module:function   trace:FILE.safetensors

A path may end in @float16 or @bfloat16, the precision to work in. Bad names are ValueErrors that say what to do.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from minisd.lab.parity.calls import one_line
from minisd.lab.parity.sides import Side, diffusers_side, minisd_side
from minisd.lab.parity.traces import read

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = "minisd:PATH, diffusers:PATH, trace:FILE.safetensors or python:package.module:function"


@dataclass
class PartSide(Side):
    """A module of the user's own. `names`: its own paths -> names in any dialect, "" being the whole of it."""

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
    """Around code that is not minisd's: what it raises becomes a ValueError, what it prints goes to standard error."""
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
