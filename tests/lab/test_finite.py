"""The NaN tracer: the first part, and step, with a value that is not finite."""

import json
import warnings

import pytest
import torch
from click.testing import CliRunner

from minisd.cli import cli
from minisd.lab.finite import block_of, nan_tracer
from tests.unit.tiny import tiny_model

SETTINGS = {"steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16, "seed": 1}


@pytest.fixture
def sd():
    return tiny_model()


def traced(sd):
    with warnings.catch_warnings(), nan_tracer(sd) as trace:
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN becomes some byte
        sd.text_to_image("a cat", **SETTINGS)
    return trace


@torch.no_grad()
def test_a_sound_model(sd):
    trace = traced(sd)
    assert trace.first is None and next(trace.lines()) == "every value is finite"
    assert {
        "unet.down.0",
        "unet.middle.1",
        "vae.decoder.up.0",
        "text_encoder.layers.1",
        "latents",
    } <= trace.peaks.keys()
    assert all(peak.absmax > 0 for peak in trace.peaks.values())


@torch.no_grad()
def test_a_weight_that_is_not_finite(sd):
    sd.unet.down[3].resnet.conv2.weight[0, 0, 1, 1] = float("nan")
    first = traced(sd).first
    assert (first.name, first.step, first.inside) == ("unet.down.3.resnet.conv2", 0, "")
    assert first.timestep == 501 and 0 < first.count <= first.numbers


@torch.no_grad()
def test_overflow_in_float16(sd):
    """60000 times too large: beyond float16's 65504, though every weight is finite."""
    for part in (sd.text_encoder, sd.unet, sd.vae):
        part.half()
    sd.unet.middle[0].attention.feed_forward.contract.bias.fill_(60000)
    sd.unet.middle[0].attention.feed_forward_norm.bias.fill_(3000)
    sd.unet.middle[0].attention.feed_forward.expand.weight.fill_(10)
    trace = traced(sd)
    assert trace.first.name == "unet.middle.0.attention.feed_forward.expand" and trace.first.step == 0
    assert any("float16's range (65504)" in line for line in trace.lines())


@torch.no_grad()
def test_code_between_the_parts(sd):
    """The activation between two convolutions: the part that is given the NaN is named too."""
    sd.unet.up[0].resnet.activation = lambda x: x / 0
    first = traced(sd).first
    assert (first.name, first.inside) == ("unet.up.0.resnet", "unet.up.0.resnet.conv1")
    assert str(first).startswith("first non-finite value: unet.up.0.resnet, on the way into unet.up.0.resnet.conv1")


@torch.no_grad()
def test_a_later_step(sd):
    """Not the first step, but the second."""
    calls = []
    right = sd.unet.conv_out.forward

    def forward(x):
        calls.append(None)
        return right(x) * (float("inf") if len(calls) == 2 else 1)

    sd.unet.conv_out.forward = forward
    first = traced(sd).first
    assert (first.name, first.step, first.timestep) == ("unet.conv_out", 1, 1)


def test_the_vae(sd):
    with torch.no_grad():
        sd.vae.decoder.up[0].norm1.weight[0] = float("inf")
    first = traced(sd).first
    assert first.name == "vae.decoder.up.0.norm1" and first.step is None


def test_nothing_stays_behind(sd):
    with pytest.raises(ValueError, match="steps"), nan_tracer(sd):
        sd.text_to_image("a cat", **{**SETTINGS, "steps": 0})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*sd.unet.modules(), *sd.vae.modules()))


def test_blocks():
    names = "unet.down.3.resnet.conv1", "vae.decoder.up.0.norm1", "vae.decoder.conv_in", "unet.conv_in", "latents"
    assert [block_of(name) for name in names] == [
        "unet.down.3",
        "vae.decoder.up.0",
        "vae.decoder.conv_in",
        "unet.conv_in",
        "latents",
    ]


def test_the_command(sd, tmp_path):
    sd.save(tmp_path / "model")
    common = [
        "generate",
        "a cat",
        "-m",
        str(tmp_path / "model"),
        "-s",
        "1",
        "--steps",
        "1",
        "-o",
        str(tmp_path / "a.png"),
    ]
    common += ["--device", "cpu", "--check"]
    result = CliRunner().invoke(cli, common, catch_exceptions=False)
    assert result.stdout.splitlines() == [str(tmp_path / "a.png")]
    assert result.stderr.startswith("every value is finite\nblock")
    told = json.loads(CliRunner().invoke(cli, [*common, "--json"], catch_exceptions=False).stdout)
    assert told["check"]["first_nonfinite"] is None and told["check"]["largest"]["unet.down.0"] > 0
