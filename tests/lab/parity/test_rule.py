"""The parts of the lab: promotion, names, resemblance, the rule itself, twins without a model."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd import SD15
from minisd.lab.names import module_names
from minisd.lab.parity.calls import Call, match
from minisd.lab.parity.compare import compare_modules
from minisd.lab.parity.judge import Observation, measure
from minisd.lab.parity.pairing import Network, pair_networks
from minisd.lab.parity.promote import as_written, float64
from minisd.lab.parity.resemblance import describe
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, SAME, Verdict, limit
from tests.lab.parity.small import small_model

# ---- float64, whatever the code says ---------------------------------------------------------------------


def hard_coded(x):
    """Code as people write it: every way of asking for float32 that there is."""
    steps = torch.arange(8, dtype=torch.float32) + torch.zeros(8) + torch.tensor([0.1])
    x = x.float() + steps.to(torch.float32) + torch.ones(8).type(torch.float32) * torch.full((8,), 1 / 3)
    x[0] = torch.linspace(0, 1, 8, dtype=torch.float32)[0] + 0.1
    x += torch.rand(8, generator=torch.Generator().manual_seed(0)).half().float() * 0
    return torch.cat([x, torch.tensor(0.1)[None]]).to(torch.float16).to(x)


def test_every_float_is_widened():
    with float64():
        said = hard_coded(torch.arange(8) / 7)
        assert said.dtype == torch.float64 and torch.get_default_dtype() == torch.float64
    assert said[-1].item() == 0.1 and said[1].item() == 1 / 7 + 1 + 0.1 + 1 / 3
    assert hard_coded(torch.arange(8) / 7).dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


def test_weights_are_widened_where_they_are_used():
    layer = nn.Linear(4, 4)
    x = torch.randn(3, 4, dtype=torch.float64)
    with float64():
        said = layer(x)
    assert layer.weight.dtype == torch.float32
    assert torch.equal(said, copy.deepcopy(layer).double()(x))


def test_a_stretch_as_it_was_written():
    with float64():
        with as_written():
            assert torch.zeros(1).dtype == torch.float32 and (torch.ones(1).half() + 1).dtype == torch.float16
        assert torch.zeros(1, dtype=torch.bfloat16).dtype == torch.float64


def test_what_is_written_into_stays_itself():
    buffer = torch.zeros(3)
    with float64():
        buffer.add_(1.0)
        buffer[1] = 5.0
        buffer *= 2
    assert buffer.tolist() == [2.0, 10.0, 2.0] and buffer.dtype == torch.float32


def test_promotion_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), float64():
        _ = 1 / 0
    assert torch.zeros(1).dtype == torch.float32


# ---- names -----------------------------------------------------------------------------------------------


def test_every_module_of_sd15_has_three_names():
    names = {one.minisd: one for one in module_names("unet", SD15.unet)}
    one = names["unet.down.4.resnet"]
    assert one.all == ("unet.down.4.resnet", "down_blocks.1.resnets.1", "model.diffusion_model.input_blocks.5.0")
    one = names["unet.down.2.downsample.conv"]
    assert one.all[1:] == ("down_blocks.0.downsamplers.0.conv", "model.diffusion_model.input_blocks.3.0.op")
    assert names["unet.down.9.resnet"].diffusers == "down_blocks.3.resnets.0"  # the innermost of two around it
    for component in ("unet", "vae", "text_encoder"):
        table = module_names(component, getattr(SD15, component))
        for dialect in ("minisd", "diffusers", "compvis"):
            given = [getattr(one, dialect) for one in table if getattr(one, dialect)]
            assert len(given) == len(set(given)), dialect


def test_twins_of_two_copies_are_at_the_same_paths():
    sd = small_model()
    networks = [Network("unet", copy.deepcopy(sd.unet), sd.unet.config) for _ in range(2)]
    twins = pair_networks(*networks)
    assert all(twin.a_path == twin.b_path for twin in twins)
    parents = {twin.name: twin.parent for twin in twins}
    assert parents["unet.down.0.resnet.conv1"] == "unet.down.0.resnet" and parents["unet.down.0"] == "unet"


def test_no_common_names():
    with pytest.raises(ValueError, match="no module in common"):
        pair_networks(Network("unet", nn.Linear(1, 1)), Network("unet", nn.Conv2d(1, 1, 1)))


# ---- how a wrong tensor is wrong -------------------------------------------------------------------------

RIGHT = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def changed(*where, by=1.0):
    wrong = RIGHT.clone()
    wrong[where] += by
    return wrong


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (RIGHT * 1.0001, "1.0001 times"),
        (RIGHT + 0.5, "0.5 is added"),
        (-RIGHT, "-1 times"),
        (torch.cat(RIGHT.chunk(2, 1)[::-1], 1), "halves are swapped along the channels"),
        (torch.cat(RIGHT.chunk(2, 0)[::-1], 0), "halves are swapped along the batch"),
        (changed(1, 2, 3, 4), r"one number is off, at \(1, 2, 3, 4\)"),
        (changed(slice(None), slice(None), slice(0, 1), slice(None)), "only the border"),
        (changed(slice(None), 2), "only channel 2"),
        (changed(1), "only sample 1"),
        (changed(0, 0, 0, 0, by=math.inf), "not finite"),
        (RIGHT[:, :2], "its shape is"),
    ],
)
def test_descriptions(wrong, words):
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(describe(RIGHT, wrong))


# ---- the rule --------------------------------------------------------------------------------------------


def test_the_limit_is_halfway_between_two_precisions():
    """On a logarithmic scale: as many times above float64's rounding as below float32's."""
    eps32, eps64 = 2.0**-23, 2.0**-52
    assert limit(eps32, eps32) / eps64 == pytest.approx(eps32 / limit(eps32, eps32))
    assert limit(0.0, eps32) == limit(eps32 / 2, eps32)  # exact by accident
    assert limit(math.inf, eps32) == limit(math.nan, eps32) == limit(1.0, eps32) < 1e-7  # a broken reference


def measured(a64, b64, b):
    return measure(Observation("x", a64, a64.float(), b64, b))


def test_measures():
    x = torch.tensor([1.0, 3.0, -4.0], dtype=torch.float64)
    found = measured(x, x, x.float() + 4 * 2.0**-22)
    assert not found.deviates and found.r64 == pytest.approx(4)
    assert measured(x, x + 1e-9, x.float()).deviates
    assert measured(x, x.clone().fill_(math.nan), x.float()).deviates
    nothing = torch.full((3,), math.nan, dtype=torch.float64)
    assert not measured(nothing, nothing, nothing.float()).deviates  # both are NaN alike


def test_json_has_no_infinity():
    verdict = Verdict(SAME, "", "a", "b", seconds=math.inf)
    assert json.loads(json.dumps(verdict.as_dict(), allow_nan=False))["seconds"] == "inf"


def test_arguments_are_matched_by_shape():
    x, time, mask = torch.randn(2, 4, 5, 5), torch.randn(2, 8), torch.zeros(5, 5, dtype=torch.bool)
    call = Call.of((time,), {"hidden": x, "mask": mask, "flag": True})
    args, kwargs = call.filled([x + 1, time + 1])
    assert torch.equal(args[0], time + 1) and torch.equal(kwargs["hidden"], x + 1)
    assert torch.equal(kwargs["mask"], mask) and kwargs["flag"] is True
    both = Call.of((x, x.clone()), {}).filled([x + 1, x + 2])[0]  # of one shape: in order
    assert torch.equal(both[0], x + 1) and torch.equal(both[1], x + 2)
    with pytest.raises(ValueError, match="A has none like it"):
        match(Call.of((torch.zeros(1, 3, 300, 300),), {}).slots(), [])


# ---- modules without a model -----------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, eps=1e-5, approximate="none"):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.LayerNorm(8, eps=eps), nn.Linear(8, 8)
        self.approximate = approximate

    def forward(self, x):
        return x + F.gelu(self.linear(self.norm(x)), approximate=self.approximate)


X = [(torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) * scale,) for scale in (1, 0.01)]


def test_modules_that_are_the_same():
    verdict = compare_modules(Block(), Block(), X)
    assert verdict.same and [rung.name for rung in verdict.rungs] == ["call 0", "call 1"]


def test_modules_that_are_not():
    verdict = compare_modules(Block(), Block(eps=1e-6), X)
    assert (verdict.word, verdict.culprits) == (DIFFERENT, ["norm"]) and "eps 1e-05 (A), 1e-06 (B)" in verdict.cause
    verdict = compare_modules(Block(), Block(approximate="tanh"), X)
    assert verdict.culprits == ["(whole)"] and "approximate none (A), tanh (B)" in verdict.cause


def test_functions():
    assert compare_modules(F.silu, lambda x: x * torch.sigmoid(x), X).word == SAME
    assert compare_modules(F.gelu, lambda x: F.gelu(x, approximate="tanh"), X).word == DIFFERENT
    assert compare_modules(F.silu, lambda x: F.silu(x.half()).float(), X).word == PRECISION


def test_a_candidate_that_fails():
    verdict = compare_modules(F.silu, lambda x: x @ x, X)
    assert verdict.word == DIFFERENT and "fails" in verdict.rungs[0].note


class Twice(nn.Module):
    """One part, called twice with another number of axes, by position and by name."""

    def __init__(self, other):
        super().__init__()
        torch.manual_seed(0)
        self.part, self.other = (Scaled2 if other else Scaled)(), other

    def forward(self, x):
        if self.other:
            return self.part(x=x, y=x[0]) + self.part(x=x[None], y=x[0, None])[0]
        return self.part(x, x[0]) + self.part(x[None], x[0, None])[0]


class Scaled(nn.Module):
    def forward(self, x, y):
        return x * y


class Scaled2(Scaled):
    pass


def test_a_part_that_is_called_twice():
    for _ in range(2):
        verdict = compare_modules(Twice(False), Twice(True), X)
        assert verdict.word == SAME and verdict.pair("part").calls == 4 and not verdict.pair("part").note


def test_names_between_structures():
    class Other(nn.Module):
        def __init__(self, eps):
            super().__init__()
            mine = Block(eps)
            self.a, self.b = mine.norm, mine.linear

        def forward(self, x):
            return x + F.gelu(self.b(self.a(x)))

    names = {"a": "norm", "b": "linear"}
    assert compare_modules(Block(), Other(1e-5), X, names=names).word == SAME
    assert compare_modules(Block(), Other(1e-6), X, names=names).culprits == ["norm"]
    assert compare_modules(Block(), Other(1e-6), X).culprits == ["(whole)"]
    with pytest.raises(ValueError, match="B has no module 'c'"):
        compare_modules(Block(), Other(1e-5), X, names={"c": "norm"})
    with pytest.raises(ValueError, match="at least one"):
        compare_modules(Block(), Block(), [])
