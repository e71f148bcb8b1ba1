"""Speed and memory beside diffusers: the same weights, in alternation, as ratios of medians.

    python scripts/benchmark.py                      # SD 1.5's size, random weights (4.3 GB of disk, 12 GB of memory)
    python scripts/benchmark.py --model PATH         # a model in diffusers' layout
    python scripts/benchmark.py --only load --rounds 5

Below 1 minisd needs less. The calls are timed in one process, which holds one set of weights for both sides; loading is
timed in a new process each time, from its start to the loaded pipeline. So are the workbench's commands, beside `cp` of
as many bytes as they write (or read), and beside diffusers' own conversion (5 and 13 GB more of disk).
"""

import argparse
import contextlib
import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import growth
import torch
from tqdm import tqdm

import minisd
from minisd.backends import ENGINES, prepare
from minisd.checkpoint.keymap import model_keys
from minisd.checkpoint.load import favour_channels_last, open_checkpoint
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import CLIPTokenizer
from minisd.unet import UNet
from minisd.vae import VAE

LOAD = {
    "minisd": "import minisd; minisd.StableDiffusion.load({path!r})",
    "diffusers": "from diffusers import StableDiffusionPipeline as P; P.from_pretrained({path!r}, safety_checker=None)",
}

DIFFUSERS_CONVERSION = (
    "from diffusers import StableDiffusionPipeline as P; "
    "P.from_single_file({single!r}, config={folder!r}, local_files_only=True, safety_checker=None)"
    ".save_pretrained({out!r})"
)

# A new process starts with its parent's memory on its account: so its parent is a small one.
MEASURED = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(status, time.perf_counter() - start, usage.ru_maxrss)
"""


@dataclass
class Row:
    """One measurement: all values of both sides, in seconds or gigabytes."""

    what: str
    ours: list[float]
    theirs: list[float]
    unit: str

    def __str__(self) -> str:
        ours, theirs = statistics.median(self.ours), statistics.median(self.theirs)
        ratios = [a / b for a, b in zip(self.ours, self.theirs, strict=True)]
        return (
            f"| {self.what} | {ours:.2f} {self.unit} | {theirs:.2f} {self.unit} | **{ours / theirs:.2f}** "
            f"| {min(ratios):.2f} to {max(ratios):.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure minisd beside diffusers.")
    parser.add_argument("--model", type=Path, help="a folder in diffusers' layout (default: SD 1.5, random weights)")
    parser.add_argument("--only", choices=[*MEASURES, *TABLES], help="one part of the benchmark")
    parser.add_argument("--plot", help="a picture of --only growth, by matplotlib")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side (default: 5)")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    tell_busy()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or Path(scratch) / "sd15"
        if options.model is None and options.only != "schedulers":
            random_sd15(folder)
        for part, show in TABLES.items():
            if options.only in (None, part):
                show(folder, options.rounds, options.plot)
        if options.only not in TABLES:
            print("| what | minisd | the other | ratio of medians | pair by pair |\n|---|---|---|---|---|")
        for part, measure in MEASURES.items():
            if options.only in (None, part):
                for row in measure(folder, options.rounds):
                    print(row, flush=True)
                gc.collect()


def tell_busy() -> None:
    """Warn where other processes work too: times are theirs as well then, and only ratios mean something."""
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: the machine is busy (load {load:.1f} before the start)", file=sys.stderr)


def show_growth(folder: Path, rounds: int, plot: str | None) -> None:
    """Time and memory of whole processes against steps, size, images and threads."""
    config = open_checkpoint(folder, dtype=None).config
    command = [sys.executable, "-m", "minisd", "generate", "red heart", "--seed", "1", "--model", str(folder)]
    found = growth.growth(
        lambda more, **environment: run_once([*command, *more], **environment), config.vae.sample_size, rounds
    )
    print("| setting | value | time | most memory |\n|---|---|---|---|")
    for name, points in found.items():
        for value, seconds, gigabytes in points:
            print(f"| {name} | {value:g} | {seconds:.2f} s | {gigabytes:.2f} GB |")
    if plot:
        growth.plot(found, plot)


@torch.no_grad()
def show_kinds(folder: Path, rounds: int, plot: str | None) -> None:
    """Where a UNet call's time goes, beside what the machine can reach."""
    print("| UNet, batch 2 | time | GFLOP/s | of the measured peak |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        unet = minisd.StableDiffusion.load(folder, dtype=dtype).unet
        most = growth.peak(dtype)
        for kind, seconds, speed in growth.kinds(unet, inputs_of(unet, dtype)):
            reached = f"{speed:.0f} | {speed / most:.0%}" if speed else "- | -"
            print(f"| {str(dtype)[6:]}: {kind} | {seconds:.3f} s | {reached} |")


def inputs_of(unet: UNet, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What guidance calls it with: latents of the default size, batch 2; a timestep; context."""
    size, width = unet.config.own_size[0], unet.config.context_width
    return torch.randn(2, 4, size, size, dtype=dtype), torch.tensor(500), torch.randn(2, 77, width, dtype=dtype)


def random_sd15(folder: Path) -> None:
    """SD 1.5 with random weights, in diffusers' layout."""
    config = minisd.SD15
    modules = TextEncoder(config.text_encoder), UNet(config.unet), VAE(config.vae)
    minisd.StableDiffusion(*modules, CLIPTokenizer.clip(), scheduler=config.scheduler).save(folder)


def alternate(what: str, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> Row:
    """Time two calls in turn, after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in tqdm(range(rounds + 1), desc=what, leave=False, disable=None):
        for call, seconds in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            if round_number:
                seconds.append(time.perf_counter() - start)
    return Row(what, *times, "s")


def twin(component: str, folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """minisd's module and diffusers'; in float32 they share their weights."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    reference = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[component]
    theirs = reference.from_pretrained(folder / component, dtype=dtype)
    state = theirs.state_dict()
    config = open_checkpoint(folder, dtype=None).config
    with torch.device("meta"):
        ours: Any = {"unet": UNet, "vae": VAE}[component](getattr(config, component))
    ours.load_state_dict({key.minisd: state[key.diffusers] for key in model_keys(config)[component]}, assign=True)
    favour_channels_last(ours.eval())
    return ours, theirs


@torch.no_grad()
def measure_unet(folder: Path, rounds: int) -> Iterator[Row]:
    """One call as guidance makes it, batch 2 at the default size, by each engine that is installed."""
    for engine, dtype in product(ENGINES, (torch.float32, torch.bfloat16)):
        if engine == "openvino" and find_spec("openvino") is None:
            continue
        ours, theirs = twin("unet", folder, dtype)
        prepare(engine, ours)
        x, t, context = inputs = inputs_of(ours, dtype)
        what = f"UNet, batch 2, {x.shape[2]}x{x.shape[3]} latents, {str(dtype)[6:]}, {engine}"
        call, other = partial(ours, *inputs), partial(theirs, x, t, encoder_hidden_states=context)
        yield alternate(what, call, other, rounds)
        if engine == "openvino":
            yield alternate(f"{what}, beside OpenVINO fed by diffusers", call, fed_by_diffusers(theirs, inputs), rounds)


def fed_by_diffusers(theirs: Any, inputs: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    """diffusers' UNet as OpenVINO runs it."""
    import openvino

    half = inputs[0].dtype == torch.bfloat16
    given = [one.float() for one in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer
        model = openvino.convert_model(theirs.float(), example_input=tuple(given))
    model.reshape([list(one.shape) for one in given])
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if half else "f32"}
    compiled = openvino.Core().compile_model(model, "CPU", hint)
    return partial(compiled, [one.numpy() for one in given])


@torch.no_grad()
def measure_vae(folder: Path, rounds: int) -> Iterator[Row]:
    """One picture each way."""
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = twin("vae", folder, dtype)
        prepare("exact", ours)
        size = ours.config.sample_size
        z = torch.randn(1, 4, size // 8, size // 8, dtype=dtype)
        images = torch.randn(1, 3, size, size, dtype=dtype)
        what = f"{size}x{size}, {str(dtype)[6:]}"
        yield alternate(f"VAE decode, {what}", lambda: ours.decode(z), lambda: theirs.decode(z), rounds)  # noqa: B023
        yield alternate(f"VAE encode, {what}", lambda: ours.encode(images), lambda: theirs.encode(images), rounds)  # noqa: B023


def measure_loading(folder: Path, rounds: int) -> Iterator[Row]:
    """A new process, from its start to the loaded pipeline; and the most memory that it held."""
    ours, theirs = ([sys.executable, "-c", code.format(path=str(folder))] for code in LOAD.values())
    yield from processes("new process to loaded pipeline, beside diffusers", ours, theirs, rounds)


def measure_workbench(folder: Path, rounds: int) -> Iterator[Row]:
    """The commands that read and write whole models, beside `cp` of one, and beside diffusers' conversion."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        here = Path(scratch)
        single, other, out = here / "single.safetensors", here / "other.safetensors", here / "out"
        command = [sys.executable, "-m", "minisd"]
        subprocess.run([*command, "convert", "-q", folder, single], check=True, stdout=subprocess.DEVNULL)
        shutil.copy(single, other)
        for what, arguments in {
            "inspect": ["inspect", single],
            "convert to a folder": ["convert", "-q", single, out],
            "convert to float16": ["convert", "-q", single, out, "--dtype", "float16"],
            "diff": ["diff", "-q", single, other],
            "merge": ["merge", "-q", single, other, out],
        }.items():
            copy = ["cp", str(single), str(here / "copy.safetensors")]
            yield from processes(f"{what}, beside cp", [*command, *map(str, arguments)], copy, rounds)
        code = DIFFUSERS_CONVERSION.format(single=str(single), folder=str(folder), out=str(here / "theirs"))
        convert = [*command, "convert", "-q", str(single), str(out)]
        yield from processes("convert, beside diffusers", convert, [sys.executable, "-c", code], rounds)


NO_STEPS = ("Scheduler", "DDIMInverseScheduler")  # the base, and the one that goes the other way


def measure_schedulers(folder: Path, rounds: int) -> Iterator[Row]:
    """A step of each, in milliseconds: runs of 20 on latents (2, 4, 64, 64), with SD 1.5's settings."""
    import diffusers

    from minisd import schedulers

    x, noise = torch.randn(2, 2, 4, 64, 64)
    names = (name for name in schedulers.__all__ if name.endswith("Scheduler") and name not in NO_STEPS)
    for name in names:
        both = [getattr(side, name).from_config(dict(minisd.SD15.scheduler)) for side in (schedulers, diffusers)]
        run, other = (partial(run_scheduler, one, x, noise) for one in both)
        row = alternate(f"a step of {name}", run, other, rounds)
        counts = len(both[0].timesteps)
        ours, theirs = ([1000 * one / counts for one in times] for times in (row.ours, row.theirs))
        yield Row(row.what, ours, theirs, "ms")


def run_scheduler(scheduler: Any, x: torch.Tensor, noise: torch.Tensor) -> None:
    """All steps of a run, with the same noise predicted in each."""
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        x = scheduler.step(noise, t, x).prev_sample


def processes(what: str, ours: list[str], theirs: list[str], rounds: int) -> Iterator[Row]:
    """Two commands in turn, after one warm-up each: how long, and with how much memory at most."""
    seconds: tuple[list[float], list[float]] = ([], [])
    memory: tuple[list[float], list[float]] = ([], [])
    for round_number in tqdm(range(rounds + 1), desc=what, leave=False, disable=None):
        for side, command in enumerate((ours, theirs)):
            elapsed, peak = run_once(command)
            if round_number:
                seconds[side].append(elapsed)
                memory[side].append(peak / 1e9)
    if theirs[0] != "cp":
        yield Row(what, *seconds, "s")
        yield Row(f"{what}: most memory", *memory, "GB")
    else:
        yield Row(f"{what} (in {statistics.median(memory[0]):.2f} GB of memory)", *seconds, "s")


def run_once(command: list[str], **environment: str) -> tuple[float, float]:
    """Run a command in a new process: wall seconds, and the largest resident memory in bytes."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"} | environment
    outer = [sys.executable, "-S", "-c", MEASURED, *command]
    told = subprocess.run(outer, env=environment, capture_output=True, text=True, check=True).stdout.split()
    if int(told[0]):
        raise SystemExit(f"error: this failed in a new process: {' '.join(command)}")
    return float(told[1]), int(told[2]) * (1 if sys.platform == "darwin" else 1024)


MEASURES: dict[str, Callable[[Path, int], Iterator[Row]]] = {
    "schedulers": measure_schedulers,
    "load": measure_loading,
    "unet": measure_unet,
    "vae": measure_vae,
    "workbench": measure_workbench,
}
TABLES = {"growth": show_growth, "kinds": show_kinds}

if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
