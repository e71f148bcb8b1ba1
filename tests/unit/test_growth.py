"""Where `scripts/benchmark.py` says that time goes."""

import growth
import torch
import torch.nn.functional as F
from torch import nn


def test_kinds_of_operation_and_their_speed():
    layer = nn.Linear(64, 32)

    def network(x):
        q = layer(x)[:, None]  # (2, 1, 100, 32)
        return F.scaled_dot_product_attention(q, q, q)

    found = {kind: seconds * speed * 1e9 for kind, seconds, speed in growth.kinds(network, (torch.randn(2, 100, 64),))}
    assert round(found["linear and matrix product"]) == 2 * 2 * 100 * 64 * 32
    assert round(found["attention"]) == 2 * 2 * 2 * 100 * 100 * 32
    assert found["the rest"] == 0


def test_growth_varies_one_setting_at_a_time(tmp_path):
    runs = []

    def run(command, **environment):
        runs.append((command[:-2], environment))
        return len(runs), 1e9 * len(runs)

    found = growth.growth(run, 64, 1)
    assert list(found) == ["steps", "size", "images", "threads"]
    assert found["steps"][0] == (5, 1, 1.0)
    assert runs[0] == (["--steps", "5", "-q"], {})
    assert (["--steps", "4", "--size", "128", "-q"], {}) in runs
    assert (["--steps", "4", "-q"], {"OMP_NUM_THREADS": "1"}) in runs
