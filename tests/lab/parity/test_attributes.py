"""What passes for rounding, and which rows of two loops belong together."""

import pytest
import torch

from minisd.lab.parity.attributes import rounding_of
from minisd.lab.parity.trajectory import matching_rows


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("count", (4, 100, 100_000))
def test_a_rounded_weight(dtype, count):
    weight = torch.randn(count, generator=torch.Generator().manual_seed(0))
    assert rounding_of(weight, weight.to(dtype)) == rounding_of(weight.to(dtype).float(), weight) == str(dtype)[6:]


@pytest.mark.parametrize("center", (0.97, 1.03))
def test_a_rounded_norm(center):
    """All its numbers are near one, where the spacing doubles, and were float16 before."""
    weight = (center + 0.01 * torch.randn(96, generator=torch.Generator().manual_seed(0))).half().float()
    assert rounding_of(weight, weight.bfloat16()) == "bfloat16"


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_what_rounding_would_hide_is_no_rounding(dtype):
    """The reference was stored in half precision: what is near it rounds to it, and is another weight."""
    stored = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    moved = stored.clone()
    moved[7] *= 1 + 1e-6
    assert rounding_of(stored, moved) == "" and rounding_of(stored, stored * 1.0001) == ""
    assert rounding_of(stored * 0.9999, stored) == ""


def inputs():
    """Latents and context of a guided batch of two: the negative half first."""
    latents, contexts = torch.randn(2, 4, 8, 8), torch.randn(4, 77, 16)
    return torch.cat([latents, latents]), contexts


def test_rows_in_either_order():
    torch.manual_seed(0)
    latents, contexts = inputs()
    swapped = latents, torch.cat([contexts[2:], contexts[:2]])
    assert matching_rows((latents, contexts), (latents, contexts)) == [0, 1, 2, 3]
    assert matching_rows(swapped, (latents, contexts)) == [2, 3, 0, 1]


def test_what_is_wrong_in_one_does_not_upset_the_order():
    """Prompts that changed places are wrong contexts, not another order; latents far off keep their contexts."""
    torch.manual_seed(0)
    latents, contexts = inputs()
    exchanged = contexts[[1, 0, 3, 2]]
    assert matching_rows((latents, exchanged), (latents, contexts)) == [0, 1, 2, 3]
    assert matching_rows((100 * torch.randn_like(latents), contexts), (latents, contexts)) == [0, 1, 2, 3]
    assert matching_rows((latents, torch.zeros_like(contexts)), (latents, contexts)) == [0, 1, 2, 3]
