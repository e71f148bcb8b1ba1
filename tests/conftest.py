"""Fixtures for all tests, and what decides which run: no network, ever; real weights only if given."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may touch the network
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes: each on one core, or they wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch


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
