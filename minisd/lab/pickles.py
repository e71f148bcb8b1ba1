"""The one door for pickles (`.ckpt`, `.pt`, `.bin`): their tensors, and nothing else, into a safetensors file.

A pickle is a program, and opening it runs it. torch's restricted reader (`weights_only=True`) runs nothing but the
building of tensors and refuses every other name; what trainers leave in checkpoints (callbacks, configurations) would
stop it there. So each name that it does not know gets a stand-in that swallows whatever is given to it and does
nothing. No class of the file is ever imported, no code of it ever run.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisd.checkpoint.errors import CheckpointError
from minisd.lab.streaming import NAMES, Entry, Made, write_file

PARAMETERS = "torch.nn.modules.container.ParameterDict"
DTYPES = {
    **NAMES,
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def unpickle(path: Path, target: Path) -> Path:
    """Write the tensors of the pickle `path` to the safetensors file `target`; returns that.

    Raises CheckpointError for what cannot be read without running it, or holds no tensors.
    """
    tensors = {name: tensor for name, tensor in tables(load(path)).items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no table of tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: the tensor {name!r} ({tensor.dtype}) cannot be stored in safetensors")
    write_file(target, [described(name, tensor) for name, tensor in tensors.items()], {"format": "pt"})
    return target


def described(name: str, tensor: Tensor) -> Entry:
    """A tensor as an entry of the new file."""
    return Entry(name, DTYPES[tensor.dtype], tuple(tensor.shape), Made(lambda: [tensor.detach()]))


def load(path: Path) -> Any:
    """What the pickle builds, tensors memory-mapped where the format allows it."""
    mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(stand_ins(path) if mapped else []):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: cannot be read without running what is in it ({reason[0][:200]})") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def stand_ins(path: Path) -> list[Any]:
    """(class, name) for every name in the file that torch does not know."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(stand_in(name), name) for name in names]


def stand_in(name: str) -> type:
    base = Parameters if name == PARAMETERS else Nothing
    return type(name.rpartition(".")[2], (base,), {"__module__": "stand-in"})


class Nothing(dict[Any, Any]):
    """Takes every argument, every item and every state, and keeps none."""

    def __new__(cls, *_: Any, **__: Any) -> "Nothing":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, *_: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


class Parameters(dict[Any, Any]):
    """In the place of torch's ParameterDict, in which the first textual inversions keep their vectors."""

    def __setstate__(self, state: Any) -> None:
        found = state.get("_parameters") if isinstance(state, Mapping) else None
        self.update(found if isinstance(found, Mapping) else {})


def tables(value: Any) -> Mapping[Any, Any]:
    """The table of tensors in any of the forms that models, LoRAs and textual inversions have."""
    if isinstance(value, Tensor):
        return {"emb_params": value}
    table = unwrapped(value)
    vectors = table.get("string_to_param")
    if not isinstance(vectors, Mapping) or not vectors:
        return table
    name = table.get("name")
    return {name if isinstance(name, str) and name else "emb_params": next(iter(vectors.values()))}


def unwrapped(value: Any) -> Mapping[Any, Any]:
    """The table of tensors, out of as many `state_dict`s as it is wrapped in."""
    for _ in range(10):
        if not isinstance(value, Mapping) or not isinstance(value.get("state_dict"), Mapping):
            break
        value = value["state_dict"]
    return value if isinstance(value, Mapping) else {}
