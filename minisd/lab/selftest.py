"""Does this machine, with this torch on this device, give the reference numbers?

The embedded model generates a small image. Each stage in float64 is compared with what is recorded in `selftest.json`:
there, machines differ by almost nothing. Then each stage in the working precision is compared with float64: how many
times the rounding that is usual there.

    python -m minisd.lab.selftest      # records anew, after the embedded model changed

In: a device and a dtype. Out: a line a stage, in words.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minisd.checkpoint.load import usable_device
from minisd.lab.parity.cases import Case
from minisd.lab.parity.sides import MinisdSide, minisd_side
from minisd.lab.parity.traces import record
from minisd.pipeline import StableDiffusion

RECORD = Path(__file__).with_name("selftest.json")
CASE = Case(prompts=("red heart",), negatives=("",), steps=2, height=64, width=64)
STAGES = {
    "tokens": "tokens",
    "noise": "initial noise",
    "text/context": "text embedding",
    "step.0/noise": "UNet, step 0",
    "step.0/previous": "latents after step 0",
    "step.1/noise": "UNet, step 1",
    "step.1/previous": "latents after step 1",
    "decode/images": "VAE decode",
}
EXACT = 1e-9  # relative: where float64 on two machines still agrees after all of this, with five digits to spare
USUAL = 16  # times the recorded rounding: other kernels round otherwise, a broken one rounds a thousand times worse


@dataclass
class Stage:
    """One stage. `float64` and `rounding` are relative to the largest value."""

    name: str
    float64: float  # how far float64 here is from the record
    rounding: float  # how far the working precision is from float64 here
    usual: float  # what rounding is usual

    @property
    def good(self) -> bool:
        return self.float64 <= EXACT and self.rounding <= USUAL * self.usual

    def __str__(self) -> str:
        if not self.float64 <= EXACT:
            return f"{self.name}: OFF by {self.float64:.1e} in float64: this torch computes something else here"
        if not self.rounding <= USUAL * self.usual:
            times = self.rounding / self.usual if self.usual else float("inf")
            return f"{self.name}: OFF by {self.rounding:.1e}, {times:,.0f} times the rounding that is usual"
        return f"{self.name}: as recorded" + (f", rounded by {self.rounding:.1e}" if self.usual else "")


@torch.no_grad()
def selftest(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Stage]:
    """Run the embedded model on `device` in `dtype`. Raises ValueError for a device that is not there."""
    place = usable_device(device)
    expected = json.loads(RECORD.read_text(encoding="utf-8"))
    exact = record(minisd_side("emoji"), CASE, exact=True)
    sd = StableDiffusion.load("emoji", dtype=dtype, device=place)
    told = record(MinisdSide(f"minisd:emoji on {device}", sd, sd.config), CASE)
    eps = torch.finfo(dtype).eps
    coarser = eps / torch.finfo(torch.float32).eps
    return [
        Stage(
            name=title,
            float64=apart(summary(exact[name]), expected[name]["summary"]),
            rounding=rounding(told[name], exact[name]),
            usual=max(expected[name]["rounding"] * coarser, eps if coarser > 1 else 0.0),
        )
        for name, title in STAGES.items()
    ]


def summary(tensor: Tensor) -> list[float]:
    """A tensor in four numbers, each of which every element moves: relative differences survive in them."""
    values = tensor.double().flatten().cpu()
    index = torch.arange(values.numel(), dtype=torch.float64)
    return [float(values.norm()), float(values.sum()), *(float(values @ (index * w).cos()) for w in (0.7, 1.3))]


def apart(one: list[float], other: list[float]) -> float:
    """The largest difference, in units of the norm, which comes first."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) / (other[0] or 1.0)


def rounding(told: Tensor, exact: Tensor) -> float:
    """How far a tensor is from itself in float64, relative to the largest value. Not a number counts as infinite."""
    difference = (told.cpu().double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)
    return float(difference.nan_to_num(nan=float("inf")))


def lines(stages: list[Stage], where: str, seconds: float) -> list[str]:
    """The result in words."""
    bad = next((stage for stage in stages if not stage.good), None)
    verdict = f"gives the reference numbers ({where}, {seconds:.1f} s)"
    if bad is not None:
        verdict = f"does NOT give the reference numbers ({where}): first {bad}"
    return [*map(str, stages), f"this machine {verdict}"]


def as_dict(stages: list[Stage], where: str) -> dict[str, Any]:
    """For JSON."""
    return {
        "good": all(stage.good for stage in stages),
        "where": where,
        "stages": [asdict(stage) | {"good": stage.good} for stage in stages],
    }


def run(device: str, dtype: str, as_json: bool) -> int:
    """The command: print the result, return the exit status."""
    start = time.perf_counter()
    where = f"torch {torch.__version__}, {device}, {dtype}"
    stages = selftest(device, getattr(torch, dtype))
    told = [json.dumps(as_dict(stages, where))] if as_json else lines(stages, where, time.perf_counter() - start)
    print(*told, sep="\n")
    return 0 if all(stage.good for stage in stages) else 1


def recorded() -> Mapping[str, Any]:
    """What is to be written down, measured here."""
    side = minisd_side("emoji")
    exact, told = record(side, CASE, exact=True), record(side, CASE)
    return {name: {"summary": summary(exact[name]), "rounding": rounding(told[name], exact[name])} for name in STAGES}


if __name__ == "__main__":
    RECORD.write_text(json.dumps(recorded(), indent=1) + "\n", encoding="utf-8")
    sys.exit(run("cpu", "float32", False))
