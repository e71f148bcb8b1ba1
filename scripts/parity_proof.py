"""Plant every mistake that the lab knows of, and see whether `minisd parity` finds it, and nothing else.

    python scripts/parity_proof.py            # all of it, on a model of two levels: minutes; prints the README's table
    python scripts/parity_proof.py --verbose  # and what was found for each

Mistakes in minisd's modules are looked for with diffusers as the reference, mistakes in diffusers' modules with minisd.
Clean changes round in another way and must not be accused. Every comparison is of the whole model.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from minisd.lab.parity.bugs import BUGS, OTHERS, copied_side, planted
from minisd.lab.parity.compare import compare, compare_pipelines
from minisd.lab.parity.sides import PipelineSide, diffusers_side
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, SAME, Verdict
from minisd.pipeline import StableDiffusion
from tests.lab.parity.small import CASE, side, small_model
from tests.lab.parity.traps import CLEAN, IN_DIFFUSERS


@dataclass
class Outcome:
    """One comparison: what it should say, and what it said."""

    group: str
    name: str
    word: str
    culprits: set[str]
    verdict: Verdict

    @property
    def found(self) -> set[str]:
        return {name.partition(", step ")[0] for name in self.verdict.culprits}

    @property
    def right(self) -> bool:
        return self.verdict.word == self.word

    @property
    def exact(self) -> bool:
        """The culprits, all of them and no other; for another precision, the module that is named."""
        if self.word == PRECISION:
            return self.right and all(self.verdict.cause.startswith(name) for name in self.culprits)
        return self.right and self.found == self.culprits


def in_minisd(sd: StableDiffusion, reference: PipelineSide) -> Iterator[Outcome]:
    for name, bug in BUGS.items():
        mutant, culprits = planted(side(sd), name)
        verdict = compare_pipelines(reference, mutant, CASE)
        yield Outcome("in minisd's modules", name, bug.word, set(culprits), verdict)


def in_diffusers(sd: StableDiffusion, reference: PipelineSide) -> Iterator[Outcome]:
    for name, plant in IN_DIFFUSERS.items():
        mutant, culprits = planted(reference, name, plant)
        verdict = compare_pipelines(side(sd), mutant, CASE)
        yield Outcome("in diffusers' modules", name, {**BUGS, **OTHERS}[name].word, set(culprits), verdict)


def elsewhere(sd: StableDiffusion) -> Iterator[Outcome]:
    """Implementations of another structure, of which a name map says as much as it can."""
    expected = {
        "wrong_fused_attention": {"unet.down.0.attention.self_attn"},
        "wrong_resnet": {"unet.down.0.resnet.norm1"},
        "numpy_clip_without_mask": {"text_encoder.layers.0", "text_encoder.layers.1"},
    }
    for name, culprits in expected.items():
        verdict = compare(side(sd), f"python:tests.lab.parity.others:{name}", CASE)
        yield Outcome("in other implementations", name, DIFFERENT, culprits, verdict)


def clean(sd: StableDiffusion, reference: PipelineSide) -> Iterator[Outcome]:
    yield Outcome("clean pairs", "diffusers and minisd", SAME, set(), compare_pipelines(reference, side(sd), CASE))
    for name, change in CLEAN.items():
        twin = copied_side(side(sd), name)
        change(twin.model)
        yield Outcome("clean pairs", name, SAME, set(), compare_pipelines(reference, twin, CASE))
    for name in ("fused_attention", "resnet", "numpy_clip"):
        verdict = compare(side(sd), f"python:tests.lab.parity.others:{name}", CASE)
        yield Outcome("clean pairs", name, SAME, set(), verdict)


def precisions(sd: StableDiffusion, folder: Path) -> Iterator[Outcome]:
    """The same function in another precision: right if it is called that."""
    half = StableDiffusion.load(folder, dtype=torch.bfloat16)
    verdict = compare_pipelines(side(sd), side(half), CASE)
    yield Outcome("other precisions", "bfloat16", PRECISION, set(), verdict)
    for module in (half.text_encoder, half.unet, half.vae):
        module.to(torch.float32)
    verdict = compare_pipelines(side(sd), side(half), CASE)
    yield Outcome("other precisions", "bfloat16 weights, upcast", PRECISION, set(), verdict)


def run() -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        small_model().save(folder)
        sd, reference = StableDiffusion.load(folder), diffusers_side(str(folder), "diffusers:small")
        yield from in_minisd(sd, reference)
        yield from in_diffusers(sd, reference)
        yield from elsewhere(sd)
        yield from clean(sd, reference)
        yield from precisions(sd, folder)


def table(outcomes: list[Outcome]) -> Iterator[str]:
    """Counts by group, as the README has them."""
    yield "| planted | pairs | right verdict | exactly the culprits, no other |"
    yield "|---|---|---|---|"
    for group in dict.fromkeys(outcome.group for outcome in outcomes):
        these = [outcome for outcome in outcomes if outcome.group == group]
        right, exact = sum(one.right for one in these), sum(one.exact for one in these)
        yield f"| {group} | {len(these)} | {right} | {exact} |"


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant mistakes and look for them.")
    parser.add_argument("--verbose", action="store_true", help="say what was found for each")
    verbose = parser.parse_args().verbose
    outcomes: list[Any] = []
    for outcome in run():
        outcomes.append(outcome)
        if verbose or not outcome.exact:
            mark = "found" if outcome.exact else "NOT FOUND"
            print(f"{mark}: {outcome.group}: {outcome.name}: {outcome.verdict.sentence}", file=sys.stderr)
    print("\n".join(table(outcomes)))
    return 0 if all(outcome.exact for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
