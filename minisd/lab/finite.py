"""Where the first NaN comes from, and how near to the end of its range a dtype is used.

    with nan_tracer(sd) as trace:
        sd.text_to_image("red heart", seed=1)
    print(trace.first, *trace.lines(), sep="\\n")

The largest float16 is 65504. A larger number becomes infinite, the next softmax makes it NaN, and the image is black.
In: a model. Out: the first module, and step, whose output is not finite though its input is; the largest magnitude of
each block. `minisd generate --check` prints them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from minisd.lab.hooks import Listener
from minisd.lab.taps import COMPONENTS, Reading, Taps


@dataclass
class Origin:
    """The first place with a non-finite value."""

    name: str  # the module whose output is not finite; or, with `inside`, whose code makes it between its submodules
    step: int | None
    timestep: int | None
    count: int
    numbers: int
    inside: str = ""  # the submodule that is given it

    def __str__(self) -> str:
        when = f" at step {self.step} (timestep {self.timestep})" if self.step is not None else ""
        where = f", on the way into {self.inside}" if self.inside else ""
        return f"first non-finite value: {self.name}{where}{when}: {self.count:,} of {self.numbers:,} numbers"


@dataclass
class Peak:
    """The largest magnitude in a block."""

    name: str
    absmax: float = 0.0
    step: int | None = None


@dataclass
class Trace:
    """A context that watches a model. `first` is None while everything is finite."""

    model: Any
    first: Origin | None = None
    peaks: dict[str, Peak] = field(default_factory=dict)  # by block, in the order of computation
    listener: Listener = field(default_factory=Listener)

    def __enter__(self) -> "Trace":
        with Listener() as listener:
            self.taps = listener.enter_context(Taps(self.model, *self.outputs(), listen=self.note))
            for component in COMPONENTS:
                for path, module in getattr(self.model, component).named_modules():
                    name = f"{component}.{path}".rstrip(".")
                    listener.before(module, lambda args, kwargs, name=name: self.check_inputs(name, args, kwargs))  # type: ignore[misc]
            self.listener = listener.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listener.close()

    def outputs(self) -> list[str]:
        """The names of all modules' outputs and of the tensors of the sampling loop."""
        return [point.name for point in Taps(self.model).points if point.kind in ("output", "loop")]

    def note(self, reading: Reading) -> None:
        """A reading: is it the first that is not finite, or the largest of its block?"""
        self.taps.readings.clear()  # nobody asks for them later
        if reading.nonfinite and self.first is None:
            numbers = torch.Size(reading.shape).numel()
            self.first = Origin(reading.name, reading.step, reading.timestep, reading.nonfinite, numbers)
        if reading.absmax > 0:
            peak = self.peaks.setdefault(block_of(reading.name), Peak(block_of(reading.name)))
            if reading.absmax > peak.absmax:
                peak.absmax, peak.step = reading.absmax, reading.step

    def check_inputs(self, name: str, args: Any, kwargs: Any) -> None:
        """Inputs are checked before the module runs: if they are not finite, the code around it made them so."""
        if self.first is not None:
            return
        for tensor in (*args, *kwargs.values()):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                count, outer = int((~tensor.isfinite()).sum()), name.rpartition(".")[0] or "the input"
                step = (self.taps.step, self.taps.timestep) if name.startswith("unet") else (None, None)
                self.first = Origin(outer, *step, count, tensor.numel(), inside=name)
                return

    def lines(self) -> Iterator[str]:
        """The findings as text: the origin, then each block's largest magnitude and its share of the range."""
        dtype = self.model.dtype
        most = torch.finfo(dtype).max
        yield str(self.first) if self.first is not None else "every value is finite"
        title = str(dtype).removeprefix("torch.")
        yield f"{'block':<36} {'largest':>10}  of {title}'s range ({most:.5g})"
        for peak in self.peaks.values():
            step = f"step {peak.step}" if peak.step is not None else ""
            yield f"{peak.name:<36} {peak.absmax:>10.4g}  {peak.absmax / most:>7.2%}  {step}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        first = None if self.first is None else vars(self.first)
        return {"first_nonfinite": first, "largest": {peak.name: peak.absmax for peak in self.peaks.values()}}


def block_of(name: str) -> str:
    """unet.down.3.resnet.conv1 -> unet.down.3; vae.decoder.up.0.norm1 -> vae.decoder.up.0."""
    parts = name.split(".")
    length = 1
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
        length = index + 1
    return ".".join(parts[: min(length, 3 if parts[0] == "vae" else 2)])


def nan_tracer(model: Any) -> Trace:
    """Watch a `StableDiffusion` for values that are not finite: a context manager."""
    return Trace(model)
