"""Every planted mistake is named exactly; no clean change is accused.

The reference is diffusers, live, for mistakes in minisd's modules, and minisd for mistakes in diffusers'.
"""

import copy

import pytest
import torch

pytest.importorskip("diffusers", reason="the reference is not installed: pip install minisd[parity]")

from minisd.lab.parity.bugs import BUGS, planted
from minisd.lab.parity.compare import compare_pipelines
from minisd.lab.parity.sides import DiffusersSide, diffusers_side
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, SAME
from minisd.pipeline import StableDiffusion
from tests.lab.parity.small import CASE, side, small_model
from tests.lab.parity.traps import CLEAN, TRAPS, WORDS, copied


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
    mutant, expected = planted(sound, name)
    verdict = compare_pipelines(theirs, side(mutant), CASE, components=components_of(expected))
    assert verdict.word == BUGS[name].word
    if verdict.word == DIFFERENT:
        assert culprits(verdict) == set(expected)
        assert verdict.cause and verdict.exit_status == 1
    else:
        assert verdict.cause.startswith(expected[0]) and verdict.exit_status == 0


@pytest.mark.parametrize("name", TRAPS)
def test_a_mistake_in_diffusers(sound, theirs, name):
    pipeline = copied(theirs.model)
    expected = TRAPS[name](pipeline)
    copied_side = DiffusersSide("a copy", pipeline, theirs.config)
    verdict = compare_pipelines(side(sound), copied_side, CASE, components=components_of(expected))
    assert verdict.word == WORDS[name]
    if verdict.word == DIFFERENT:
        assert culprits(verdict) == set(expected)
    else:
        assert verdict.cause.startswith(expected[0])


def copy_of(sd: StableDiffusion) -> StableDiffusion:
    twin = copy.copy(sd)
    for part in ("text_encoder", "unet", "vae"):
        setattr(twin, part, copy.deepcopy(getattr(sd, part)))
    return twin


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_change(sound, theirs, name):
    twin = copy_of(sound)
    CLEAN[name](twin)
    verdict = compare_pipelines(theirs, side(twin), CASE)
    assert (verdict.word, verdict.culprits) == (SAME, [])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounded_weights_are_another_precision(sound, theirs, dtype):
    """Stored in half precision and computed with in float32: the function is the same, its numbers are rounded."""
    twin = copy_of(sound)
    for module in (twin.text_encoder, twin.unet, twin.vae):
        module.to(dtype).to(torch.float32)
    verdict = compare_pipelines(theirs, side(twin), CASE)
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
