"""Fixtures for all tests, and what decides which run: no network, ever; real weights only if given."""

import os
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may touch the network
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: each on one core, or they wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

REFERENCES = ("diffusers", "transformers", "accelerate", "peft", "scipy")  # what minisd is compared with, and its needs


def pytest_configure() -> None:
    """A missing reference skips tests on a laptop, visibly; in continuous integration it fails the whole run."""
    if os.environ.get("CI") and (missing := missing_references()):
        raise pytest.UsageError(f"not installed: {', '.join(missing)}; pip install -e '.[test]'")


def missing_references() -> list[str]:
    return [name for name in REFERENCES if find_spec(name) is None]


# What takes seconds a test: trained models, whole images, browsers, other processes.
SLOW = """
adapters/ explain/ pages/ studio/ programs/test_parts programs/test_pipelines programs/test_programs tasks/ training/
lab/parity/test_bundle lab/parity/test_plugin lab/parity/test_proof lab/parity/test_report lab/parity/test_sides
lab/test_convert lab/test_finite lab/test_merge lab/test_selftest lab/test_surgery lab/test_taps lab/test_zoo
parity/test_ledger parity/test_pipeline parity/test_teeth unit/test_embedded_model unit/test_hub unit/test_references
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in those files and folders as slow."""
    for item in items:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        if name.startswith(tuple(SLOW)):
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--weights", metavar="PATH", help="also run the tests on real SD 1.5 weights at PATH")


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory):
    """diffusers' pipeline in miniature, and the folder that diffusers saved it to and loaded it from again.

    Loaded again, because its weights then lie in a mapped file, as minisd's do: on some processors torch's kernels
    round by where a matrix begins in memory.
    """
    from tests.parity.reference import NARROW, reference_pipeline

    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("twin")
    pipeline = reference_pipeline(NARROW, tmp_path_factory.mktemp("tokenizer"))
    pipeline.save_pretrained(folder)
    again = type(pipeline).from_pretrained(folder)
    again.set_progress_bar_config(disable=True)
    return again, folder


@pytest.fixture(scope="session")
def ours(twin):
    """minisd's model, loaded from what diffusers saved."""
    import minisd

    return minisd.StableDiffusion.load(twin[1])
