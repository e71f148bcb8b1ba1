"""Modules and functions without a model: what counts as a difference, and what does not."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd.lab.parity.compare import compare_modules, compare_pipelines
from minisd.lab.parity.conclude import conclude
from minisd.lab.parity.resemblance import describe
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, SAME, UNKNOWN, ModulePair
from tests.lab.parity.small import CASE, side, small_model


def rows(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 8)), generator=torch.Generator().manual_seed(seed))


def word(a, b, *inputs) -> str:
    return compare_modules(a, b, [inputs or (rows(),)]).word


# ---- code that writes into its arguments -----------------------------------------------------------------


class Residual(nn.Module):
    """The activation is given a tensor that is needed again."""

    def __init__(self, inplace, plus=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.act, self.last = nn.Linear(8, 8), nn.SiLU(inplace=inplace), nn.Linear(8, 8)
        self.plus = plus

    def forward(self, x):
        h = self.linear(x)
        return h + self.last(self.act(h)) + self.plus


@pytest.mark.parametrize(
    "write", [lambda x: x.zero_() * 2, lambda x: x.clamp_(-0.5, 0.5) * 2, lambda x: x.relu_().mul(2)]
)
def test_what_the_candidate_writes_into_its_input_does_not_reach_the_reference(write):
    assert word(lambda x: x * 2, write) == DIFFERENT


def test_writing_alone_is_no_difference():
    assert word(lambda x: x.mul_(2), lambda x: x * 2) == SAME
    assert word(lambda x: x * 2, lambda x: x.mul_(2)) == SAME
    assert word(Residual(True), Residual(True)) == SAME


def test_an_activation_that_overwrites_a_residual():
    assert word(Residual(False), Residual(True)) == DIFFERENT
    assert word(Residual(True), Residual(False)) == DIFFERENT


def test_tensors_and_buffers_of_the_caller_stay_as_they_are():
    x = rows().double()
    before = x.clone()
    assert word(lambda x: x.mul_(2), lambda x: x.mul_(2), x) == SAME and torch.equal(x, before)
    norm = nn.BatchNorm1d(8)
    assert word(norm, copy.deepcopy(norm), rows()) == SAME
    assert torch.equal(norm.running_mean, torch.zeros(8)) and norm.num_batches_tracked == 0


def test_a_network_that_clamps_its_latents_in_place():
    sound = small_model()
    mutant = copy.copy(sound)
    mutant.unet = copy.deepcopy(sound.unet)
    forward = mutant.unet.forward
    mutant.unet.forward = lambda x, *args, **kwargs: forward(x.clamp_(-1, 1), *args, **kwargs)
    verdict = compare_pipelines(side(sound), side(mutant), CASE, components=["unet"])
    assert (verdict.word, verdict.culprits) == (DIFFERENT, ["unet"])


# ---- everything that is returned -------------------------------------------------------------------------


class Pair(nn.Module):
    """Returns two tensors."""

    def __init__(self, factor=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.factor = nn.Linear(8, 8), factor

    def forward(self, x):
        return self.linear(x), self.linear(x) * self.factor


class Around(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.pair = Pair(factor)

    def forward(self, x):
        return sum(self.pair(x))


def test_every_tensor_of_an_output_counts():
    assert word(lambda x: (x, x * 2), lambda x: (x, x * 3)) == DIFFERENT
    assert word(lambda x: {"a": x, "b": x * 2}, lambda x: {"a": x, "b": x * 3}) == DIFFERENT
    assert word(lambda x: {"a": x, "b": x * 2}, lambda x: {"b": x * 2, "a": x}) == SAME  # by key
    assert word(lambda x: ((x,), x * 2), lambda x: [[x], x * 2]) == SAME
    assert word(lambda x: (x, x), lambda x: x) == DIFFERENT
    assert word(torch.fft.fft, lambda x: torch.view_as_complex(torch.view_as_real(torch.fft.fft(x)) * 1.0)) == SAME
    assert word(torch.fft.fft, lambda x: torch.fft.fft(x).real + 0j) == DIFFERENT
    assert compare_modules(Around(1.0), Around(1.5), [(rows(),)]).culprits == ["pair"]


def test_shapes_of_the_whole_count():
    verdict = compare_modules(lambda x: x, lambda x: x.reshape(8, 2), [(rows(),)])
    assert verdict.word == DIFFERENT and "(8, 2) instead of (2, 8)" in verdict.cause
    assert word(lambda x: x, lambda x: x[0], rows(0, 1, 8)) == DIFFERENT


def test_whole_numbers_and_truth_values():
    assert word(lambda x: x.argmax(-1), lambda x: x.argmax(-1)) == SAME
    assert word(lambda x: x.argmax(-1), lambda x: x.argmin(-1)) == DIFFERENT
    assert word(lambda x: x > 0, lambda x: x >= 0) == SAME
    assert word(lambda x: x > 0, lambda x: x >= x.max()) == DIFFERENT


# ---- weights ---------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """A linear layer whose weight lies the other way."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().t().contiguous())
        self.bias = nn.Parameter(linear.bias.detach().clone())

    def forward(self, x):
        return x @ self.weight + self.bias


def with_zero_bias(linear):
    other = nn.Linear(8, 8)
    other.weight = linear.weight
    nn.init.zeros_(other.bias)
    return other


def test_half_weights_are_another_precision():
    reference = Residual(False)
    verdict = compare_modules(reference, copy.deepcopy(reference).half(), [(rows(),)])
    assert (verdict.word, verdict.culprits) == (PRECISION, [])
    tied = nn.Sequential(linear := nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    tied[2].weight = linear.weight
    weight = linear.weight.detach().clone()
    assert compare_modules(tied, copy.deepcopy(tied).half(), [(rows(),)]).word == PRECISION
    assert compare_modules(copy.deepcopy(tied).half(), tied, [(rows(),)]).word == PRECISION
    assert torch.equal(linear.weight, weight)  # what was lent is back


def test_weights_of_another_form():
    linear, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    assert word(linear, Transposed(linear)) == SAME
    assert word(linear, lambda x: F.linear(x, linear.weight, linear.bias)) == SAME
    assert word(norm, lambda x: (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5) ** 0.5) == SAME
    bare = nn.Linear(8, 8, bias=False)
    assert word(bare, with_zero_bias(bare)) == SAME


def test_a_weight_that_the_inputs_do_not_reach():
    words = nn.Embedding(10, 4)
    other = copy.deepcopy(words)
    with torch.no_grad():
        other.weight[9, 3] += 1e-3
    verdict = compare_modules(words, other, [(torch.tensor([1, 2]),)])
    assert verdict.word == DIFFERENT and "does not reach" in verdict.cause


# ---- a reference that is none ----------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(x))


def test_a_reference_that_is_not_finite():
    reference = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        reference[1].weight[0, 0] = float("nan")
    verdict = compare_modules(reference, copy.deepcopy(reference), [(rows(),)])
    assert (verdict.word, verdict.exit_status) == (UNKNOWN, 2)
    assert verdict.sentence == "cannot tell: A is not finite from 1 on"
    assert word(lambda x: x, lambda x: x / 0) == DIFFERENT


def test_a_model_that_is_not_finite(recwarn):
    broken = small_model()
    with torch.no_grad():
        broken.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    verdict = compare_pipelines(side(broken), side(broken), CASE, components=["unet"])
    assert verdict.sentence == "cannot tell: A is not finite from unet.conv_in on"
    assert not [warning for warning in recwarn if warning.category is RuntimeWarning]


def test_a_reference_that_says_nothing():
    assert word(lambda x: x[:0], lambda x: x[:0]) == UNKNOWN


def test_a_reference_that_does_not_repeat_itself():
    verdict = compare_modules(Noisy(), Noisy(), [(rows(),)])
    assert verdict.word == UNKNOWN and verdict.sentence == "cannot tell: A does not repeat itself at drop"
    assert word(Noisy().eval(), Noisy().eval()) == SAME
    assert compare_modules(Noisy().eval(), Noisy(), [(rows(),)]).culprits == ["drop"]


@pytest.mark.parametrize("fail", [lambda x: 1 / 0, lambda x: Path("/not/there").read_text()])
def test_a_candidate_that_fails_in_any_way(fail):
    assert word(lambda x: x, fail) == DIFFERENT


# ---- constants that were rounded -------------------------------------------------------------------------


class Waves(nn.Module):
    """Frequencies that are computed each time, or kept as float32 in a buffer."""

    def __init__(self, kept):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 8)
        if kept:
            self.register_buffer("kept", self.frequencies(), persistent=False)

    def frequencies(self):
        return torch.exp(-torch.arange(4, dtype=torch.float32) * 2.3)

    def forward(self, t):
        angles = t[:, None].float() * (self.kept if hasattr(self, "kept") else self.frequencies())
        return self.linear(torch.cat([angles.cos(), angles.sin()], -1))


def test_a_rounded_constant_is_another_precision():
    constant = torch.tensor(0.18215)
    verdict = compare_modules(lambda x: x * 0.18215, lambda x: x * constant, [(rows(),)])
    assert verdict.word == PRECISION and "a constant is rounded to float32" in verdict.sentence
    times = torch.tensor([1, 501, 999])
    assert torch.equal(Waves(False)(times), Waves(True)(times))
    assert word(Waves(False), Waves(True), times) == PRECISION


def test_what_is_more_than_a_rounded_constant():
    assert word(lambda x: x * 0.18215, lambda x: x * 0.182151) == DIFFERENT
    assert word(lambda x: x, lambda x: x * 1.0001) == DIFFERENT
    linear = nn.Linear(8, 8)
    other = copy.deepcopy(linear)
    with torch.no_grad():
        other.weight[0, 0] += 1e-7
    assert word(linear, other) == DIFFERENT


# ---- the sentence ----------------------------------------------------------------------------------------


def test_where_a_part_without_rungs_was_seen():
    pair = ModulePair("unet.conv_in", "", "", "", status=DIFFERENT, culprit=True, stage="UNet, step 0")
    assert "first seen at 'UNet, step 0'" in conclude("A", "B", [], [pair]).sentence
    pair.stage = ""
    assert "in what the case does not reach" in conclude("A", "B", [], [pair]).sentence


def test_describing_what_is_no_float():
    assert describe(torch.tensor([True, False]), torch.tensor([True, True])) == "one number is off, at (1,)"
    assert "2 times" in describe(torch.tensor([1, 2]), torch.tensor([2, 4]))
