"""`minisd selftest`: this machine passes; one that computes something else, or rounds too much, is told where."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from minisd.lab import selftest
from minisd.lab.selftest import lines, recorded
from minisd.layers import ACTIVATIONS


def first_off(stages):
    return next((stage.name for stage in stages if not stage.good), None)


def test_the_command():
    result = subprocess.run([sys.executable, "-m", "minisd", "selftest"], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1].startswith("this machine gives the reference numbers")
    command = [sys.executable, "-m", "minisd", "selftest", "--dtype", "bfloat16", "--json"]
    assert json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["good"] is True


def test_the_record_is_of_the_model_that_ships():
    """Else: python -m minisd.lab.selftest."""
    stored = json.loads(selftest.RECORD.read_text())
    for name, now in recorded().items():
        assert selftest.apart(now["summary"], stored[name]["summary"]) <= selftest.EXACT


def test_another_function(monkeypatch):
    """silu with a slope of 1.0001: the text encoder has none."""
    changed = ACTIVATIONS | {"silu": lambda x: x * torch.sigmoid(1.0001 * x)}
    monkeypatch.setattr("minisd.layers.ACTIVATIONS", changed)
    stages = selftest.selftest()
    assert first_off(stages) == "UNet, step 0"
    assert "first UNet, step 0: OFF by" in lines(stages, "here", 1.0)[-1]


def test_coarse_rounding(monkeypatch):
    """A matrix multiplication that rounds its factors, as some devices do unless they are told not to."""
    whole = F.linear

    def coarse(x, weight, bias=None):
        if x.dtype == torch.float32:
            x, weight = x.bfloat16().float(), weight.bfloat16().float()
        return whole(x, weight, bias)

    monkeypatch.setattr(F, "linear", coarse)
    stages = selftest.selftest()
    assert first_off(stages) == "text embedding" and "times the rounding that is usual" in str(stages[2])


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="cannot be used here"):
        selftest.selftest("toaster")
