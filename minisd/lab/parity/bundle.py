"""A comparison to hand on: one zip of JSON and safetensors, with what is needed to see it again elsewhere.

    bundle.json                    the two sides, the case, versions, the command, the sha256 of every weight file
    inputs.safetensors             the noise that both sides started from
    verdict.json                   what was found
    a.safetensors, b.safetensors   a side that was a trace

In: a verdict and how its sides were called; out: a file. Or from a file, the sides and the case. Weights are not in it:
they are looked for where they were, or at other sides that the reader names, and it is said if they are others.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from minisd.checkpoint.hub import sha256
from minisd.checkpoint.survey import find
from minisd.files import CheckpointError, write_whole
from minisd.lab.parity.cases import Case
from minisd.lab.parity.opening import DTYPES
from minisd.lab.parity.verdict import EXIT_STATUS, Verdict

LARGEST = {".safetensors": 4_000_000_000, ".json": 20_000_000}  # bytes of a member, unpacked
KINDS = ("minisd:", "diffusers:", "trace:")  # sides that a bundle may name: "python:" would run code


# What reading a broken bundle ends with.
BROKEN = (zipfile.BadZipFile, KeyError, TypeError, AttributeError, SafetensorError, RecursionError)


@dataclass(frozen=True)
class Stored(Case):
    """A case whose noise is the bundle's, whatever this torch would draw."""

    start: Tensor | None = None

    def as_dict(self) -> dict[str, Any]:
        """The numbers, without the noise."""
        values = {name: value for name, value in vars(self).items() if name != "start"}
        return {**values, "prompts": list(self.prompts), "negatives": list(self.negatives)}

    def latents(self, channels: int, factor: int) -> Tensor:
        """The stored noise, (B, channels, height / factor, width / factor)."""
        return super().latents(channels, factor) if self.start is None else self.start


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds, read."""

    sides: tuple[str, str]
    case: Case
    word: str  # of the verdict that was found
    weights: Mapping[str, Mapping[str, str]]  # side -> file -> sha256


def check_sides(path: Path, sides: tuple[str | None, str | None]) -> None:
    """Raise ValueError for sides that no bundle can hold."""
    for side in sides:
        if side is None or not side.startswith(KINDS):
            raise ValueError(f"{path}: a bundle holds two sides of {', '.join(f'{kind}PATH' for kind in KINDS)}")


def write(path: Path, verdict: Verdict, sides: tuple[str, str]) -> Path:
    """Write a bundle, all or nothing. Raises ValueError for a name or sides that will not do."""
    check_sides(path, sides)
    if path.suffix != ".zip" or not path.parent.is_dir():
        raise ValueError(f"{path}: must be a name that ends in .zip, in a folder that exists")
    case = Case.from_dict(verdict.case)
    traces = {letter: side.partition(":")[2] for letter, side in zip("ab", sides, strict=True) if is_trace(side)}
    about = {
        "minisd.parity": 1,
        "sides": list(sides),
        "case": verdict.case,
        "versions": verdict.versions,
        "command": verdict.command,
        "weights": {side: sums(side) for side in sides},
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("bundle.json", json.dumps(about, indent=1))
        bundle.writestr("verdict.json", json.dumps(verdict.as_dict()))
        bundle.writestr("inputs.safetensors", save({"noise": noise_of(case, sides)}))
        for letter, trace in traces.items():
            bundle.write(trace, f"{letter}.safetensors")
    write_whole(path, file.getvalue())
    return path


def is_trace(side: str) -> bool:
    return side.startswith("trace:")


def model_path(side: str) -> str | None:
    """Where the weights of a side are; None for what has none of its own."""
    kind, _, path = side.partition(":")
    stem, at, dtype = path.rpartition("@")
    return None if kind not in ("minisd", "diffusers") else stem if at and dtype in DTYPES else path


def sums(side: str) -> dict[str, str]:
    """A side's weight files, by folder and name, and their sha256."""
    path = model_path(side)
    files = {file for found in find(path).values() for file in found.files.location.values()} if path else set()
    return {f"{file.parent.name}/{file.name}": sha256(file) for file in sorted(files)}


def noise_of(case: Case, sides: tuple[str, str]) -> Tensor:
    """What the loops start from; of two traces, which have their own, none."""
    path = next(filter(None, map(model_path, sides)), None)
    if path is None:
        return torch.zeros(0)
    vae = find(path)["vae"].config
    return case.latents(vae.latent_channels, vae.downsampling)


@contextmanager
def opened(path: Path) -> Iterator[Bundle]:
    """Read a bundle; its traces are there as files for as long as this lasts.

    Raises FileNotFoundError, or CheckpointError for a file that is no bundle. Nothing in it is executed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    with TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as bundle:
                found = read(path, bundle, Path(folder))
        except (*BROKEN, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: is no bundle that `minisd parity --save` wrote") from None
        yield found


def read(path: Path, bundle: zipfile.ZipFile, folder: Path) -> Bundle:
    """All but the traces into memory, those into `folder`."""
    for member in bundle.infolist():
        if member.file_size > LARGEST.get(Path(member.filename).suffix, 0):
            raise CheckpointError(f"{path}: {member.filename} claims {member.file_size:,} bytes")
    about = json.loads(bundle.read("bundle.json"))
    noise = load(bundle.read("inputs.safetensors"))["noise"]
    a, b = (str(side) for side in about["sides"])
    for side in (a, b):
        if not side.startswith(KINDS):
            raise CheckpointError(f"{path}: names the side {side[:60]!r}, which is no file: compare it by name")
    for letter, side in (("a", a), ("b", b)):
        if is_trace(side):
            (folder / f"{letter}.safetensors").write_bytes(bundle.read(f"{letter}.safetensors"))
    a, b = (f"trace:{folder / letter}.safetensors" if is_trace(side) else side for letter, side in (("a", a), ("b", b)))
    case = Stored(**asdict(Case.from_dict(about["case"])), start=noise if noise.numel() else None)
    word = json.loads(bundle.read("verdict.json"))["word"]
    weights = {str(side): {**files} for side, files in about["weights"].items()}
    if word not in EXIT_STATUS:
        raise KeyError(word)
    return Bundle((a, b), case, word, weights)


def differences(bundle: Bundle) -> list[str]:
    """Sentences on what is not as it was when the bundle was made."""
    return [
        f"{side}: {name} is not the file that the bundle was made with"
        for side in bundle.sides
        for name, digest in sums(side).items()
        if bundle.weights.get(side, {}).get(name, digest) != digest
    ]
