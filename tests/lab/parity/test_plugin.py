"""The pytest plugin, as a user of it would: a reimplemented resnet block beside minisd's."""

import subprocess
import sys

import pytest

USER = """
import torch
import torch.nn.functional as F
from torch import nn
from minisd.layers import ResnetBlock

NAMES = {names}

class Mine(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.n1, self.c1 = nn.GroupNorm(8, 32, eps=1e-5), nn.Conv2d(32, 32, 3, padding=1)
        self.t = nn.Linear(16, 32)
        self.n2, self.c2 = nn.GroupNorm(8, 32, eps=eps), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x, time):
        h = self.c1(F.silu(self.n1(x))) + self.t(F.silu(time))[:, :, None, None]
        return x + self.c2(F.silu(self.n2(h)))

def test_block(minisd_parity):
    torch.manual_seed(0)
    reference = ResnetBlock(32, 32, time_width=16, groups=8, eps=1e-5, activation="silu")
    mine = Mine(eps={eps})
    mine.load_state_dict(dict(zip(mine.state_dict(), reference.state_dict().values())))
    minisd_parity(reference, mine, torch.randn(2, 32, 8, 8), torch.randn(2, 16), names=NAMES)

def test_functions(minisd_parity):
    minisd_parity(F.gelu, lambda x: F.gelu(x, approximate="{gelu}"), torch.randn(1000))
"""


NAMES = '{"n1": "norm1", "c1": "conv1", "t": "time", "n2": "norm2", "c2": "conv2"}'


def run(folder, **settings):
    source = USER
    for name, value in {"names": NAMES, **settings}.items():
        source = source.replace("{" + name + "}", value)
    (folder / "test_user.py").write_text(source)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "test_user.py",
    ]  # installed, the plugin is found by its entry point
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_what_is_the_same_passes(tmp_path):
    assert "2 passed" in run(tmp_path, eps="1e-5", gelu="none").stdout


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        (
            {"eps": "1e-6", "gelu": "none"},
            ("norm2: R64", "eps: 1e-05 in the reference, 1e-06", "test_user.py::test_block"),
        ),
        ({"eps": "1e-5", "gelu": "tanh"}, ("different function", "test_user.py::test_functions")),
    ),
)
def test_what_is_not_fails_with_the_culprit(tmp_path, changes, words):
    result = run(tmp_path, **changes)
    assert result.returncode == 1 and "1 failed, 1 passed" in result.stdout
    assert all(word in result.stdout for word in words)


@pytest.mark.parametrize(
    ("names", "words"),
    (
        ('{"n1": "norm1", "c1": "conv9"}', "names: the reference has no module 'conv9'; it has norm1, conv1"),
        ('{"n9": "norm1"}', "names: the candidate has no module 'n9'; it has n1, c1"),
        ('["norm1"]', "names: must be a dict from paths in the candidate to paths in the reference"),
    ),
)
def test_wrong_names_are_told_in_a_sentence(tmp_path, names, words):
    result = run(tmp_path, eps="1e-5", gelu="none", names=names)
    assert f"minisd_parity: {words}" in result.stdout and "1 failed, 1 passed" in result.stdout
    assert "Error" not in result.stdout and len(result.stdout.splitlines()) < 12


def test_it_loads_nothing_before_it_is_used():
    program = "import sys, minisd.lab.parity.plugin; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
