"""Taps: reading changes nothing, edits do what they say, and nothing stays behind."""

import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from minisd import SD15
from minisd.cli.parity import taps as taps_command
from minisd.lab.taps import Reading, Taps, catalogue, probabilities, statistics
from tests.unit.tiny import tiny_model

SETTINGS = {"steps": 3, "guidance_scale": 4.0, "height": 64, "width": 96, "negative_prompt": "red"}
CROSS = "unet.middle.0.attention.cross_attn.probabilities"


@pytest.fixture(scope="module")
def sd():
    return tiny_model()


def generate(sd, **changes) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in sd.text_to_image("a cat", seed=1, **{**SETTINGS, **changes})])


def latents(sd) -> torch.Tensor:
    *_, last = sd.denoise("a cat", seed=1, **SETTINGS)
    return last.latents


def hooks(sd) -> int:
    modules = [module for part in (sd.unet, sd.vae, sd.text_encoder) for module in part.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@pytest.mark.parametrize("keep", (False, True))
def test_reading_everything_changes_no_bit(sd, keep):
    plain, picture = latents(sd), generate(sd)
    with sd.taps(keep=keep) as taps:
        assert torch.equal(latents(sd), plain)
        assert np.array_equal(generate(sd), picture)
    names = {reading.name for reading in taps.readings}
    assert names >= {point.name for point in taps.points if point.name.startswith(("unet", "text", "guidance", "x0"))}


@pytest.mark.parametrize("failure", (ValueError, KeyboardInterrupt))
def test_nothing_stays_behind(sd, failure):
    before = set(vars(sd))

    def breaks(tensor, at):
        raise failure("enough")

    with pytest.raises(failure), sd.taps("*", edit={"unet.middle.0.resnet": breaks}):
        generate(sd)
    assert hooks(sd) == 0 and set(vars(sd)) == before
    with pytest.raises(ValueError, match="no tap answers"):
        sd.taps("unet.nowhere").__enter__()
    assert hooks(sd) == 0


def test_steps_and_halves(sd):
    with sd.taps("guidance.*", "latents", "x0", CROSS, keep=True) as taps:
        steps = list(sd.denoise("a cat", seed=1, **SETTINGS))
    assert [reading.step for reading in taps["latents"]] == [0, 1, 2]
    assert [reading.timestep for reading in taps["x0"]] == [step.timestep for step in steps]
    assert [reading.timestep for reading in taps[CROSS]] == [step.timestep for step in steps]
    assert torch.equal(taps["latents"][1].tensor, steps[1].latents)
    negative, positive, guided = (taps[f"guidance.{name}"][0].tensor for name in ("negative", "positive", "guided"))
    assert torch.equal(guided, negative + 4.0 * (positive - negative))
    reading = taps[CROSS][0]
    assert reading.halves and torch.equal(torch.cat([reading.negative, reading.positive]), reading.tensor)


def test_the_halves_are_the_right_way_round(sd):
    """The positive half is what the prompt alone gives."""
    with sd.taps("guidance.positive", "unet", keep=True) as taps:
        next(iter(sd.denoise("a cat", seed=1, **SETTINGS)))
    with sd.taps("unet", keep=True) as alone:
        next(iter(sd.denoise("a cat", seed=1, **{**SETTINGS, "guidance_scale": 1.0})))
    torch.testing.assert_close(taps["guidance.positive"][0].tensor, alone["unet"][0].tensor)
    assert not alone["unet"][0].halves
    with pytest.raises(ValueError, match="no guidance"):
        _ = alone["unet"][0].negative


def test_no_tensor_is_kept_unless_asked_for(sd):
    with sd.taps("unet*") as taps:
        generate(sd, steps=1)
    assert taps.readings and all(reading.tensor is None for reading in taps.readings)
    with pytest.raises(ValueError, match="keep=True"):
        _ = taps["unet"][0].positive


def test_statistics(sd):
    with sd.taps("unet.conv_in", CROSS, keep=True) as kept:
        generate(sd, steps=1)
    with sd.taps("unet.conv_in", CROSS) as streamed:
        generate(sd, steps=1)
    for name in ("unet.conv_in", CROSS):
        tensor, reading = kept[name][0].tensor, streamed[name][0]
        assert reading.shape == tuple(tensor.shape)
        assert reading.mean == pytest.approx(tensor.mean().item(), rel=1e-4)
        assert reading.std == pytest.approx(tensor.std(correction=0).item(), rel=1e-4)
        assert reading.absmax == tensor.abs().max().item()


def test_statistics_of_a_tensor_in_parts():
    whole = torch.cat([torch.randn(50) + 1000, torch.randn(70) - 3, torch.tensor([math.nan, math.inf])])
    reading = Reading("x", None, None, tuple(whole.shape), whole.dtype)
    statistics(reading, list(whole.split(30)))
    finite = whole[:-2].double()
    assert reading.mean == pytest.approx(finite.mean().item()) and reading.nonfinite == 2
    assert reading.std == pytest.approx(finite.std(correction=0).item(), rel=1e-6)


@pytest.mark.parametrize("name", ("text_encoder.layers.0.self_attn", "unet.down.0.attention.self_attn"))
def test_probabilities_are_what_the_kernel_uses(sd, name):
    """Their product with v, through the last layer, is what attention says; CLIP's look back only."""
    with sd.taps(f"{name}*", keep=True) as taps:
        generate(sd, steps=1)
    maps, v, said = (taps[f"{name}{end}"][0].tensor for end in (".probabilities", ".v", ""))
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    module = getattr(sd, name.partition(".")[0]).get_submodule(name.partition(".")[2])
    heads = v.unflatten(-1, (module.heads, -1)).transpose(1, 2)
    torch.testing.assert_close(module.out((maps @ heads).transpose(1, 2).flatten(2)), said, rtol=1e-4, atol=1e-5)
    assert bool((maps.triu(1) == 0).all()) is name.startswith("text")


def test_an_edit_of_every_kind(sd):
    plain = latents(sd)
    for name in ("unet.middle.0.resnet", CROSS, "unet.up.0.resnet.residual", "unet.time_embedding.waves", "latents"):
        with sd.taps(edit={name: lambda tensor, at: tensor}):
            assert torch.equal(latents(sd), plain), name
        with sd.taps(edit={name: lambda tensor, at: tensor.flip(-1)}):
            assert not torch.equal(latents(sd), plain), name
    for half in ("negative", "positive", "guided"):
        with sd.taps(edit={f"guidance.{half}": lambda tensor, at: tensor * 1.1}) as taps:
            assert not torch.equal(latents(sd), plain), half
        assert taps.readings == []


def test_an_edit_knows_where_it_is(sd):
    """Only at the last step: what came before is as it was."""
    seen = []

    def at_the_end(tensor, at):
        seen.append((at.name, at.step, at.timestep))
        return tensor * 2 if at.step == 2 else tensor

    plain = [step.latents for step in sd.denoise("a cat", seed=1, **SETTINGS)]
    with sd.taps(edit={"unet.conv_in": at_the_end}):
        changed = [step.latents for step in sd.denoise("a cat", seed=1, **SETTINGS)]
    assert [step for _, step, _ in seen] == [0, 1, 2]
    assert [torch.equal(*pair) for pair in zip(plain, changed, strict=True)] == [True, True, False]


def test_edited_maps_take_the_kernels_place(sd):
    """A map that is only copied gives the same result, up to what another order of sums rounds."""
    plain = latents(sd)
    with sd.taps(edit={CROSS: lambda maps, at: maps.clone()}):
        torch.testing.assert_close(latents(sd), plain)


IN_PLACE = (CROSS, "unet.middle.0.attention.residual", "unet.up.0.resnet.residual", "unet.down.0.resnet")
LOOP = ("unet.time_embedding.waves", "guidance.negative", "guidance.guided", "latents")


@pytest.mark.parametrize("name", IN_PLACE + LOOP)
def test_an_edit_may_write_into_what_it_is_given(sd, name):
    """In place or out of place is the same, and neither writes into what somebody else holds."""
    plain = latents(sd)
    with sd.taps(edit={name: lambda tensor, at: tensor * 0.5}):
        anew = latents(sd)
    with sd.taps(edit={name: lambda tensor, at: tensor.mul_(0.5)}):
        assert torch.equal(latents(sd), anew)
    assert not torch.equal(anew, plain)


@pytest.mark.parametrize(
    ("edit", "cause"),
    [
        (lambda tensor, at: None, "must return a tensor, not a NoneType"),
        (lambda tensor, at: tensor.numpy(), "must return a tensor, not a ndarray"),
        (lambda tensor, at: tensor[..., :-1], r"must return a tensor of shape \(.*\), not \("),
    ],
)
@pytest.mark.parametrize("name", (CROSS, "unet.up.0.resnet.residual", "unet.down.0.resnet", "guidance.guided"))
def test_an_edit_that_returns_something_else(sd, name, edit, cause):
    with pytest.raises(ValueError, match=f"the edit of {name} {cause}"), sd.taps(edit={name: edit}):
        latents(sd)
    assert hooks(sd) == 0


def test_x0_cannot_be_edited(sd):
    with pytest.raises(ValueError, match="x0 is shown only"):
        sd.taps(edit={"x0": lambda tensor, at: tensor})


def test_one_at_a_time(sd):
    before = set(vars(sd))
    with sd.taps("unet") as taps, pytest.raises(ValueError, match="open already"), taps:
        pass
    assert hooks(sd) == 0 and set(vars(sd)) == before
    with taps:  # one after the other is well
        latents(sd)
    assert len(taps.readings) == SETTINGS["steps"]


def test_two_that_are_left_in_another_order(sd):
    before, plain = set(vars(sd)), latents(sd)
    first, second = sd.taps("latents"), sd.taps(edit={"latents": lambda tensor, at: tensor * 0})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not latents(sd).any() and first.readings == []
    second.__exit__(None, None, None)
    assert torch.equal(latents(sd), plain) and hooks(sd) == 0 and set(vars(sd)) == before


def test_a_loop_that_goes_on_after_the_end(sd):
    """What began inside is neither read nor edited outside."""
    seen = []

    def nothing(tensor, at):
        seen.append(at.step)
        return tensor

    with sd.taps("latents", "guidance.guided", edit={"latents": nothing, "guidance.guided": nothing}) as taps:
        loop = sd.denoise("a cat", seed=1, **SETTINGS)
        next(loop)
    next(loop)
    with taps:  # opened again, they do not hear the old loop
        assert len(list(loop)) == 1
    assert (len(taps.readings), len(seen)) == (2, 2)


@pytest.mark.parametrize(
    ("asked", "minisd"),
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2", "unet.down.0.attention.cross_attn"),
        ("down_blocks.0.*.attn1.probabilities", "unet.down.0.attention.self_attn.probabilities"),
        ("model.diffusion_model.input_blocks.1.0", "unet.down.0.resnet"),
        ("text_model.encoder.layers.1.mlp", "text_encoder.layers.1.feed_forward"),
        ("first_stage_model.decoder.up.3.block.0", "vae.decoder.up.0"),
    ],
)
def test_names_of_other_dialects(sd, asked, minisd):
    assert Taps(sd).find(asked)[0].name == minisd


def test_a_strange_name(sd):
    with pytest.raises(ValueError, match=r"'unet\.down\.0\.resnett'; did you mean unet\.down\.0\.resnet\?"):
        sd.taps("unet.down.0.resnett")


def test_causal_probabilities():
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    maps = probabilities(q, k, causal=True)
    assert bool((maps.triu(1) == 0).all()) and torch.allclose(maps.sum(-1), torch.ones(1, 2, 5))


# ---- the list --------------------------------------------------------------------------------------------


def test_shapes_of_the_list_are_those_of_a_run(sd):
    shapes = {row.name: row.shape for row in catalogue(sd.config)}
    with sd.taps() as taps:
        sd.text_to_image("a cat", seed=1, steps=1, guidance_scale=4.0)
    seen = {r.name: r.shape for r in taps.readings if r.name.startswith(("unet", "vae.decoder", "guidance", "x0"))}
    assert seen and seen == {name: shapes[name] for name in seen}


def test_the_list_of_sd15():
    rows = {row.name: row for row in catalogue(SD15)}
    row = rows["unet.down.4.attention.cross_attn.probabilities"]
    assert row.shape == (2, 8, 1024, 77) and row.source.startswith("minisd/layers.py:")
    assert "down_blocks.1.attentions.1.transformer_blocks.0.attn2.probabilities" in row.aliases
    assert all(row.meaning and row.source for row in rows.values())


def test_the_command(tmp_path):
    tiny_model().save(tmp_path / "model")
    result = CliRunner().invoke(taps_command, [str(tmp_path / "model"), "--grep", "middle.0.attention.cross", "--json"])
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert result.exit_code == 0 and rows[1]["name"] == "unet.middle.0.attention.cross_attn"
    table = CliRunner().invoke(taps_command, [str(tmp_path / "model"), "--list", "--grep", "guidance"]).output
    assert table.splitlines()[0].split() == ["name", "shape", "meaning", "source"] and len(table.splitlines()) == 4
