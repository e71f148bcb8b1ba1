"""The parity ledger holds: what `scripts/parity_ledger.py` prints is within what it allows."""

import torch

import minisd
from tests.parity.ledger import DTYPES, measure


def test_ledger(twin):
    pipelines = {dtype: type(twin[0]).from_pretrained(twin[1], dtype=dtype) for dtype in DTYPES}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    models = {dtype: minisd.StableDiffusion.load(twin[1], dtype=dtype) for dtype in DTYPES}
    entries = measure(pipelines, models)
    assert len(entries) == 15
    assert [entry for entry in entries if entry.difference > entry.allowed] == []
    exact = [entry for entry in entries if entry.dtype != torch.bfloat16]
    assert all(entry.difference == 0 for entry in exact)
