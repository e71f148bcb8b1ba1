"""Print the parity ledger: each module, in each dtype, on a CPU: how far minisd is from diffusers, and may be.

    python scripts/parity_ledger.py                # a narrow twin of SD 1.5: seconds
    python scripts/parity_ledger.py --model PATH   # any model in diffusers' layout

The comparisons are those of tests/parity/ledger.py, which the tests hold to.
"""

import argparse
import platform
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline

import minisd
from tests.parity.ledger import DTYPES, Entry, measure, measure_engines, other_engines
from tests.parity.reference import NARROW, reference_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the parity ledger.")
    parser.add_argument("--model", type=Path, help="a folder in diffusers' layout (default: a narrow random twin)")
    folder = parser.parse_args().model
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = make_twin(Path(scratch))
        pipelines = {dtype: StableDiffusionPipeline.from_pretrained(folder, dtype=dtype) for dtype in DTYPES}
        for pipeline in pipelines.values():
            pipeline.set_progress_bar_config(disable=True)
        models = {dtype: minisd.StableDiffusion.load(folder, dtype=dtype) for dtype in DTYPES}
        show(measure(pipelines, models) + measure_engines(folder, other_engines()))


def make_twin(scratch: Path) -> Path:
    """SD 1.5's architecture with narrow widths and shaken random weights, as diffusers saves it."""
    torch.manual_seed(0)
    reference_pipeline(NARROW, scratch / "tokenizer").save_pretrained(scratch / "twin")
    return scratch / "twin"


def show(entries: list[Entry]) -> None:
    """The ledger as a Markdown table."""
    print("| module | dtype | largest difference | error | allowed |")
    print("|---|---|---|---|---|")
    for entry in entries:
        dtype = str(entry.dtype).removeprefix("torch.")
        difference = "0 (torch.equal)" if entry.difference == 0 else f"{entry.difference:.1e}"
        error = "-" if entry.exact and entry.dtype == torch.float32 else f"{entry.error:.2e}"
        module = entry.module if entry.engine == "exact" else f"{entry.module}, engine {entry.engine}"
        allowed = "torch.equal" if entry.exact else f"{entry.allowed:.2e}"
        print(f"| {module} | {dtype} | {difference} | {error} | {allowed} |")
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    print(f"\nMeasured with {versions} on a CPU ({platform.machine()}).")


if __name__ == "__main__":
    main()
