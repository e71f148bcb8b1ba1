"""Pickles (`.ckpt`, `.pt`, `.bin`): their tensors, and nothing else, into a safetensors file.

A pickle is a program, and opening it runs it. torch's restricted reader (`weights_only=True`) runs nothing but the
building of tensors and refuses every other name; what trainers leave in checkpoints (callbacks, configurations) would
stop it there. So each name that it does not know gets a stand-in that takes whatever is given to it and does
nothing. No class of the file is ever imported, no code of it ever run.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from minisd.checkpoint.header import read_header
from minisd.files import CheckpointError
from minisd.lab.weights.streaming import NAMES, Entry, Made, write_file

PARAMETERS = "torch.nn.modules.container.ParameterDict"
ZIP = b"PK\x03\x04"  # how torch's format since 1.6 begins; before that a file was a row of bare pickles
SHARED = 10  # times its size that a file's tensors may take: some share their values, a bomb's all share one
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
        if reason := unfit(name, tensor):
            raise CheckpointError(f"{path}: the tensor {name!r} cannot be stored in safetensors: {reason}")
    entries = [described(name, tensor) for name, tensor in tensors.items()]
    if sum(entry.bytes for entry in entries) > SHARED * path.stat().st_size:
        raise CheckpointError(f"{path}: its tensors would take more than {SHARED} times the room that the file takes")
    write_file(target, entries, {"format": "pt"})
    return target


def unfit(name: Any, tensor: Tensor) -> str | None:
    """Why a tensor of a pickle is none that safetensors holds; None if it is one."""
    if not is_name(name):
        return "this is no name"
    if tensor.is_quantized:
        return f"it is quantised ({tensor.dtype})"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"it is {'nested' if tensor.is_nested else f'sparse ({tensor.layout})'}"
    if tensor.device.type != "cpu":
        return f"it is on the device {tensor.device.type!r}, without values"
    if tensor.dtype not in DTYPES:
        return f"it has the dtype {tensor.dtype}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"it claims {tensor.numel():,} values, but the file holds fewer of them"
    return None


def is_name(name: Any) -> bool:
    """Is this text that can be written? A pickle's may have half a character in it."""
    try:
        return isinstance(name, str) and name.encode() != b"__metadata__"
    except UnicodeEncodeError:
        return False


def described(name: str, tensor: Tensor) -> Entry:
    """A tensor as an entry of the new file."""
    return Entry(name, DTYPES[tensor.dtype], tuple(tensor.shape), Made(lambda: [laid_out(tensor)]))


def laid_out(tensor: Tensor) -> Tensor:
    """A copy whose bytes are its values, one after the other. What torch calls contiguous need not be: [[1]] is."""
    return tensor.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def load(path: Path) -> Any:
    """What the pickle builds, tensors memory-mapped where the format allows it.

    Whatever torch raises on the way becomes a CheckpointError: a broken pickle can raise anything.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(len(ZIP)) == ZIP
        with plainly_named(path) as named, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol, about old storages: nothing that could be done here
            with torch.serialization.safe_globals(stand_ins(named) if zipped else []):
                return torch.load(named, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        raise CheckpointError(f"{path}: {refusal(path, error)}") from None


@contextmanager
def plainly_named(path: Path) -> Iterator[Path]:
    """The file under a name that says nothing: torch takes whatever is called .safetensors for one, unread."""
    with TemporaryDirectory() as folder:
        link = Path(folder) / "pickle"
        link.symlink_to(path.resolve())
        yield link


def refusal(path: Path, error: Exception) -> str:
    """Why a file was not read, in a few words: torch's own are many, and recommend to run what is in it."""
    _, asked, rest = str(error).partition("GLOBAL ")
    if asked and rest.strip():
        name = rest.split()[0][:80].encode("unicode_escape").decode()
        return f"cannot be read without running what is in it (it asks for {name})"
    if is_safetensors(path):
        return "is no pickle, but safetensors already: it needs no --from-pickle"
    return f"is damaged, or no pickle that the restricted reader of torch understands ({type(error).__name__})"


def is_safetensors(path: Path) -> bool:
    try:
        return bool(read_header(path))
    except CheckpointError:
        return False


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
