"""The parity ledger holds: what `scripts/parity_ledger.py` prints is within what it allows."""

import pytest
import torch
from torch import Tensor

import minisd
from minisd import unet
from tests.parity.ledger import DTYPES, measure, measure_engines, other_engines


@pytest.fixture(scope="module")
def sides(twin):
    """diffusers' pipelines and minisd's models, by dtype."""
    pipelines = {dtype: type(twin[0]).from_pretrained(twin[1], dtype=dtype) for dtype in DTYPES}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines, {dtype: minisd.StableDiffusion.load(twin[1], dtype=dtype) for dtype in DTYPES}


def test_ledger(sides):
    entries = measure(*sides)
    assert len(entries) == 15
    assert [entry for entry in entries if not entry.holds] == []
    assert all(entry.difference == 0 for entry in entries if entry.dtype != torch.bfloat16)


def test_ledger_of_engines(twin, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    entries = measure_engines(twin[1], other_engines())
    assert len(entries) == 2 * len(other_engines())
    assert [entry for entry in entries if not entry.holds] == []


# The layout of convolutions is what bfloat16 alone does: mistakes there, from plain to subtle.
MISTAKES = {
    "channels and pixels mixed up": lambda x: x.flatten(1).roll(1).reshape(x.shape),
    "scaled by 6 %": lambda x: x * 1.06,
    "one pixel off": lambda x: x.roll(1, dims=3),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_path_that_only_bfloat16_takes(sides, monkeypatch, name):
    laid_out = unet.like_layout

    def mistaken(x: Tensor, reference: Tensor) -> Tensor:
        x = laid_out(x, reference)
        return MISTAKES[name](x) if x.dtype == torch.bfloat16 else x

    monkeypatch.setattr(unet, "like_layout", mistaken)
    wrong = [entry for entry in measure(*sides, ["UNet"]) if not entry.holds]
    assert [entry.dtype for entry in wrong] == [torch.bfloat16]
