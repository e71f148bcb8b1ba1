"""Every planted mistake is named exactly; no clean change is accused.

The reference is diffusers, live, for mistakes in minisd's modules, and minisd for mistakes in diffusers'.
"""

import pytest
import torch

pytest.importorskip("diffusers", reason="the reference is not installed: pip install minisd[parity]")

from minisd.lab.parity.bugs import BUGS, OTHERS, copied_side, planted
from minisd.lab.parity.compare import compare_pipelines
from minisd.lab.parity.sides import diffusers_side
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, SAME
from minisd.pipeline import StableDiffusion
from tests.lab.parity.small import CASE, side, small_model
from tests.lab.parity.traps import CLEAN, IN_DIFFUSERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "model"
    small_model().save(folder)
    return folder


@pytest.fixture(scope="module")
def sound(folder):
    return StableDiffusion.load(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return diffusers_side(str(folder), "diffusers:small")


def culprits(verdict) -> set[str]:
    """Names; of a rung that is there for every step, once."""
    return {name.partition(", step ")[0] for name in verdict.culprits}


def components_of(names: list[str]) -> set[str]:
    """Where to look, for the sake of time: all that is between the networks, and the networks named.

    `scripts/parity_proof.py` looks everywhere, for each mistake.
    """
    return {name.partition(".")[0] for name in names} & {"unet", "vae", "text_encoder"}


def test_the_two_are_the_same_function(sound, theirs):
    verdict = compare_pipelines(theirs, side(sound), CASE)
    assert (verdict.word, verdict.culprits) == (SAME, [])
    assert {pair.name for pair in verdict.pairs if pair.calls} >= {"unet", "unet.up.0.resnet.conv1", "vae.decoder"}
    assert all(pair.relative64 <= pair.limit for pair in verdict.pairs if pair.calls)
    assert verdict.exit_status == 0


@pytest.mark.parametrize("name", BUGS)
def test_a_mistake_in_minisd(sound, theirs, name):
    mutant, expected = planted(side(sound), name)
    verdict = compare_pipelines(theirs, mutant, CASE, components=components_of(expected))
    assert verdict.word == BUGS[name].word
    if verdict.word == DIFFERENT:
        assert culprits(verdict) == set(expected)
        assert verdict.cause and verdict.exit_status == 1
    else:
        assert verdict.cause.startswith(expected[0]) and verdict.exit_status == 0


@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_a_mistake_in_diffusers(sound, theirs, name):
    mutant, expected = planted(theirs, name, IN_DIFFUSERS[name])
    verdict = compare_pipelines(side(sound), mutant, CASE, components=components_of(expected))
    assert verdict.word == {**BUGS, **OTHERS}[name].word
    if verdict.word == DIFFERENT:
        assert culprits(verdict) == set(expected)
    else:
        assert verdict.cause.startswith(expected[0])


def test_as_many_as_the_proof_says():
    assert (len(BUGS), len(IN_DIFFUSERS), len(CLEAN)) == (56, 24, 7)


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_change(sound, theirs, name):
    twin = copied_side(side(sound), name)
    CLEAN[name](twin.model)
    verdict = compare_pipelines(theirs, twin, CASE)
    assert (verdict.word, verdict.culprits) == (SAME, [])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounded_weights_are_another_precision(sound, theirs, dtype):
    """Stored in half precision and computed with in float32: the function is the same, its numbers are rounded."""
    twin = copied_side(side(sound), "rounded")
    for module in (twin.model.text_encoder, twin.model.unet, twin.model.vae):
        module.to(dtype).to(torch.float32)
    verdict = compare_pipelines(theirs, twin, CASE)
    assert (verdict.word, verdict.culprits) == (PRECISION, [])
    assert "rounded to " + str(dtype).removeprefix("torch.") in verdict.cause


def test_the_same_rounded_weights_on_both_sides(folder):
    """bf16 weights, upcast by either loader."""
    half = StableDiffusion.load(folder, dtype=torch.bfloat16)
    half.save(folder.parent / "half")
    upcast = StableDiffusion.load(folder.parent / "half")
    verdict = compare_pipelines(diffusers_side(str(folder.parent / "half")), side(upcast), CASE)
    assert verdict.word == SAME


def test_a_whole_model_in_half_precision(folder, sound):
    verdict = compare_pipelines(side(sound), side(StableDiffusion.load(folder, dtype=torch.bfloat16)), CASE)
    assert verdict.word == PRECISION
    assert "A computes in float32, B in bfloat16" in verdict.sentence
