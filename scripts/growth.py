"""How time and memory grow, and where the time goes: the parts of `benchmark.py` that have no other side.

python scripts/benchmark.py --only growth --model emoji --plot growth.png
python scripts/benchmark.py --only kinds
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

Point = tuple[float, float, float]  # the setting, seconds, GB
STEPS = 4  # of a run whose steps are not what is varied
KINDS = {"attention": "scaled_dot_product", "convolution": "conv", "linear and matrix product": "mm", "norm": "norm"}


def growth(run: Callable[..., tuple[float, float]], size: int, rounds: int) -> dict[str, list[Point]]:
    """Whole processes of `minisd generate`: medians of time and memory against one setting at a time.

    `run`(command, **environment) -> seconds and bytes; `size`: the model's own, in pixels.
    """
    cores = os.cpu_count() or 1
    threads = sorted({1, cores} | {2**power for power in range(1, 7) if 2**power < cores})
    varied: dict[str, list[int]] = {
        "steps": [5, 10, 20, 40],
        "size": [size // 2, size * 3 // 4, size, size * 2],
        "images": [1, 2, 4],
        "threads": threads,
    }
    return {name: [measured(run, name, value, rounds) for value in values] for name, values in varied.items()}


def measured(run: Callable[..., tuple[float, float]], name: str, value: int, rounds: int) -> Point:
    """The median run at one value of one setting."""
    environment = {"OMP_NUM_THREADS": str(value)} if name == "threads" else {}
    steps = [] if name == "steps" else ["--steps", str(STEPS)]
    with tempfile.TemporaryDirectory() as scratch:
        given = [] if name == "threads" else [f"--{name}", str(value)]
        command = [*steps, *given, "-q", "-o", str(Path(scratch, "out.png"))]
        times, peaks = zip(*(run(command, **environment) for _ in range(rounds)), strict=True)
    return value, statistics.median(times), statistics.median(peaks) / 1e9


def plot(found: dict[str, list[Point]], path: str) -> None:
    """Time and memory against each setting, in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, len(found), figsize=(3 * len(found), 5), sharey="row", layout="constrained")
    for column, (name, points) in enumerate(found.items()):
        settings, *sides = zip(*points, strict=True)
        for row, (values, unit) in enumerate(zip(sides, ("s", "GB"), strict=True)):
            panels[row][column].plot(settings, values, "o-")
            panels[row][column].set(xlabel=name, ylabel=unit if column == 0 else "")
    for left, *_ in panels:
        left.set_ylim(bottom=0)  # once all is drawn: the panels of a row share it
    figure.savefig(path, dpi=100)


def attention_flops(q: list[int], k: list[int], v: list[int], *_: Any, **__: Any) -> int:
    """Of both products; torch has no formula for its kernel on a CPU. q (B, h, N, d), k and v (B, h, M, d)."""
    return 4 * prod(q) * k[2]


FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}


def kind_of(operation: str) -> str:
    return next((kind for kind, part in KINDS.items() if part in operation), "the rest")


@torch.no_grad()
def kinds(network: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Iterator[tuple[str, float, float]]:
    """(kind of operation, seconds, GFLOP/s) of one call, the longest first; what has no formula has 0 GFLOP."""
    network(*inputs)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counted:
        network(*inputs)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        network(*inputs)
    flops: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for operation, count in counted.get_flop_counts()["Global"].items():
        flops[kind_of(str(operation))] = flops.get(kind_of(str(operation)), 0) + count / 1e9
    for event in seen.key_averages():
        kind = kind_of(event.key)
        seconds[kind] = seconds.get(kind, 0) + event.self_cpu_time_total / 1e6
    for kind, taken in sorted(seconds.items(), key=lambda item: -item[1]):
        yield kind, taken, flops.get(kind, 0) / taken


@torch.no_grad()
def peak(dtype: torch.dtype, side: int = 2048, rounds: int = 5) -> float:
    """The most GFLOP/s of a large matrix product: what this machine can reach."""
    a, b = torch.randn(2, side, side).to(dtype)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * side**3 / 1e9 / (time.perf_counter() - start))
    return best
