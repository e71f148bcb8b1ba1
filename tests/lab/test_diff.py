"""`minisd diff`: two checkpoints side by side, whatever their layout and precision."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from minisd import CheckpointError
from minisd.cli.weights import diff as diff_command
from minisd.lab.weights.convert import convert
from minisd.lab.weights.diff import compare, lines
from tests.lab.test_inspect import UNET, averaged
from tests.unit.tiny import compvis_tensors, tiny_model


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    return compvis_tensors(tiny_model(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def a(tensors, tmp_path):
    return write(tensors, tmp_path / "a.safetensors")


def write(tensors, path):
    save_file(tensors, path)
    return path


def test_the_same_in_two_layouts(tmp_path):
    convert("emoji", tmp_path / "b.safetensors")
    difference = compare("emoji", tmp_path / "b.safetensors")
    assert difference.same and difference.verdicts == ["A and B are the same model"]
    assert len(difference.changes) == 686 + 248 + 68


def test_one_weight_moved(tensors, a, tmp_path):
    name = UNET + "middle_block.0.in_layers.2.weight"
    b = write(tensors | {name: tensors[name] * 1.5}, tmp_path / "b.safetensors")
    difference = compare(a, b)
    (change,) = difference.movers
    assert change.name == "unet.middle.0.resnet.conv1.weight"
    assert (change.relative, change.cosine) == pytest.approx((0.5, 1.0))
    assert [title for title, part in difference.components.items() if part.changed] == ["unet"]
    assert difference.verdicts == ["A is B with another UNet"]
    ours = difference.blocks["unet.middle.0"]
    whole = math.sqrt(
        sum(
            float(t.double().square().sum())
            for n, t in tensors.items()
            if "middle_block.0." in n or "middle_block.1." in n
        )
    )
    assert ours.relative == pytest.approx(float(tensors[name].double().norm()) / 2 / whole, rel=1e-6)


def test_another_vae(tensors, a, tmp_path):
    other = {name: t + 0.01 if name.startswith("first_stage") else t for name, t in tensors.items()}
    assert compare(a, write(other, tmp_path / "b.safetensors")).verdicts == ["A is B with another VAE"]


def test_rounded_to_half(tensors, a, tmp_path):
    half = write({name: t.half() for name, t in tensors.items()}, tmp_path / "b.safetensors")
    difference = compare(a, half)
    assert difference.verdicts == ["A and B are equal after rounding to float16"] and not difference.same
    nudged = {name: t + 1e-3 for name, t in tensors.items()}
    assert compare(a, write(nudged, tmp_path / "c.safetensors")).verdicts == []


def test_one_is_the_average_of_the_other(tensors, tmp_path):
    b = write(tensors | {n: t * 2 for n, t in averaged(tensors).items()}, tmp_path / "b.safetensors")
    a = write({n: t * 2 if n.startswith(UNET) else t for n, t in tensors.items()}, tmp_path / "a.safetensors")
    assert "A's UNet is B's averaged (EMA) UNet" in compare(a, b).verdicts
    assert "B's UNet is A's averaged (EMA) UNet" in compare(b, a).verdicts


def test_what_only_one_has(tensors, a, tmp_path):
    vae = write({n: t for n, t in tensors.items() if n.startswith("first_stage")}, tmp_path / "vae.safetensors")
    difference = compare(vae, a)
    assert difference.verdicts == ["every weight that both have is the same"]
    assert difference.only["a"] == [] and len(difference.only["b"]) == 686 + 32
    assert any(line.startswith("  only in B: 718 weights") for line in lines(difference))


def test_another_shape(tensors, a, tmp_path):
    name = UNET + "input_blocks.0.0.weight"
    difference = compare(a, write(tensors | {name: torch.zeros(32, 9, 3, 3)}, tmp_path / "b.safetensors"))
    assert difference.misshapen == ["unet.conv_in.weight"] and not difference.same


def test_nan_is_a_change_and_equals_itself(tensors, a, tmp_path):
    """Bit for bit; and what is not finite is null in JSON, which knows no infinity."""
    name = UNET + "out.2.bias"
    b = write(tensors | {name: torch.full_like(tensors[name], math.nan)}, tmp_path / "b.safetensors")
    assert compare(b, b).same and compare(b, b).movers == []
    difference = compare(a, b)
    assert difference.components["unet"].changed == 1
    assert json.loads(json.dumps(difference.as_dict(), allow_nan=False))["movers"][0]["relative"] is None


def test_other_settings_are_no_same_model(tmp_path):
    """The same weights, decoded at another scale, after another schedule."""
    for name, changes in (("a", {}), ("b", {"scaling_factor": 0.5})):
        sd = tiny_model()
        sd.vae.config = sd.vae.config.__class__(**{**vars(sd.vae.config), **changes})
        sd.save(tmp_path / name)
    schedule = tmp_path / "b/scheduler/scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"prediction_type": "v_prediction"}))
    difference = compare(tmp_path / "a", tmp_path / "b")
    assert difference.settings[0] == "VAE: scaling_factor is 0.18215 in A and 0.5 in B"
    assert "only B says: prediction type: v_prediction" in difference.settings[1]
    assert not difference.same and difference.verdicts == ["A and B have the same weights and other settings"]


def test_nothing_in_common(a, tmp_path):
    lora = write({"lora_unet_x.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="nothing to compare"):
        compare(a, lora)


def test_the_command(tensors, a, tmp_path):
    b = write({n: t * 2 if n.startswith(UNET) else t for n, t in tensors.items()}, tmp_path / "b.safetensors")
    told = CliRunner().invoke(diff_command, [str(a), str(b), "--json"], catch_exceptions=False).output
    assert json.loads(told)["components"]["unet"]["relative"] == pytest.approx(1.0)
    done = CliRunner().invoke(diff_command, [str(a), str(b), "-q", "--plot", str(tmp_path / "p.png")])
    assert done.output.splitlines()[-1] == str(tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").width == 720
