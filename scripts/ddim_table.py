"""The claim of the DDIM paper, measured: quality against the number of steps and eta, like its table 1.

    python scripts/ddim_table.py runs/ddim                 # the fashion model; started again, it makes what is missing
    python scripts/ddim_table.py runs/ddim --count 100 --steps 5 10 20

Quality is KID to real pictures, by the classifier that comes with the model, and how often that recognises what was
asked for. Etas are those of DDIM; sigma-hat is DDPM's larger variance (DDIM, section 5.1), all from the same noise.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from fashion_data import CLASSES, FOLDER, read_fashion
from PIL import Image

ETAS = (0.0, 0.2, 0.5, 1.0)
STEPS = (5, 10, 20, 50, 100, 1000)
HAT = "sigma-hat"
Scores = dict[tuple[str, int], dict[str, Any]]  # (eta, steps) -> a row of minisd score


def minisd(*arguments: object) -> None:
    """Run a command of minisd."""
    subprocess.run([sys.executable, "-m", "minisd", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def write_reference(folder: Path, count: int) -> None:
    """The first real test pictures, as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures, _ = read_fashion(FOLDER, "t10k")
    for index, picture in enumerate(pictures[:count]):
        Image.fromarray(picture[0].numpy()).save(folder / f"{index:05}.png")


def measure(out: Path, options: argparse.Namespace) -> Scores:
    """Make what is missing, and score it all."""
    prompts, reference = out / "prompts.txt", out / "real"
    if not reference.exists():
        write_reference(reference, options.reference)
    prompts.write_text("\n".join(CLASSES))
    steps = "steps=" + ",".join(map(str, options.steps))
    common: list[object] = ["--model", "fashion", "--per-prompt", options.count // len(CLASSES), "--batch", 50]
    common += ["--guidance", 1, "--shard-size", 250, "--threads", options.threads]
    etas = "eta=" + ",".join(f"{eta:g}" for eta in ETAS)
    minisd("sample", prompts, out / "eta", *common, "--grid", steps, etas)
    minisd("sample", prompts, out / "hat", *common, "--scheduler", "ddpm_large", "--grid", steps)
    found: Scores = {}
    for folder in (out / "eta", out / "hat"):
        metrics = ("--metric", "kid", "--metric", "recognised")
        minisd("score", folder, "--reference", reference, "--features", "fashion", *metrics)
        for row in json.loads((folder / "scores.json").read_text())["rows"]:
            found[f"{row['eta']:g}" if "eta" in row else HAT, row["steps"]] = row
    return found


def table(found: Scores, value: Any) -> str:
    """A line an eta, a column a number of steps."""
    steps = sorted({number for _, number in found})
    lines = [f"| eta | {' | '.join(map(str, steps))} |", "|---|" + "---|" * len(steps)]
    for eta in (*(f"{eta:g}" for eta in ETAS), HAT):
        lines.append(f"| {eta} | {' | '.join(value(found[eta, number]) for number in steps)} |")
    return "\n".join(lines)


def conclusion(found: Scores) -> str:
    """How many times fewer steps are as good as the most of DDPM (eta 1), by eta, within two standard deviations."""
    most = max(number for _, number in found)
    aim = found["1", most]
    told = [f"DDPM's {most} steps (eta 1) have a KID of {aim['kid']:.4f} ± {aim['kid_std']:.4f}."]
    for eta in (*(f"{eta:g}" for eta in ETAS), HAT):
        near = [
            number
            for number in sorted(number for _, number in found)
            if (row := found[eta, number])["kid"] <= aim["kid"] + 2 * math.hypot(row["kid_std"], aim["kid_std"])
        ]
        fewer = (
            f"{near[0]} steps are as good: {most / near[0]:.3g} times fewer" if near else "no number of steps here is"
        )
        told.append(f"eta {eta}: {fewer}.")
    return "\n".join(told)


def consistency(steps: tuple[int, ...] = (10, 20, 50, 100), count: int = 20) -> str:
    """DDIM's latent decides the picture, whatever the steps (section 5.2): the distance from the last, by eta."""
    from minisd.pixel.pipeline import PixelDiffusion

    model, lines = PixelDiffusion.load("fashion"), []
    noise = [i % len(CLASSES) for i in range(count)]
    for eta in (0.0, 1.0):
        ends = []
        for number in steps:
            *_, last = model.denoise(noise, steps=number, eta=eta, seed=0, guidance_scale=1.0)
            ends.append(last.latents)
        errors = [float((end - ends[-1]).square().mean().sqrt()) for end in ends[:-1]]
        lines.append(f"| {eta:g} | {' | '.join(f'{error:.3f}' for error in errors)} |")
    head = f"| eta | {' | '.join(f'{number} steps' for number in steps[:-1])} |\n|---|" + "---|" * (len(steps) - 1)
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure quality against steps and eta.")
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--count", type=int, default=1000, help="pictures of each cell (default 1000)")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--reference", type=int, default=2000, help="real pictures (default 2000)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = measure(options.out, options)
    kid = table(found, lambda row: f"{row['kid']:.4f} ± {row['kid_std']:.4f}")
    share = table(found, lambda row: f"{row['recognised']:.1%}")
    text = (
        f"KID, {options.count} pictures a cell:\n\n{kid}\n\nRecognised as asked:\n\n{share}\n\n{conclusion(found)}\n\n"
        f"How far pictures are from those of 100 steps, from the same noise (root mean square, of [-1, 1]):\n\n"
        f"{consistency()}\n"
    )
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
