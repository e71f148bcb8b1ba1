"""`minisd inspect` and `minisd keys`: what a header tells, said in words, without torch and without a value read."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from minisd.checkpoint.keymap import COMPONENTS, COMPVIS_PREFIX, ema_name, model_keys
from minisd.cli.weights import inspect as inspect_command
from minisd.cli.weights import keys as keys_command
from minisd.config import SD15
from minisd.files import CheckpointError
from minisd.lab.weights.inspect import inspect, naming
from minisd.lab.weights.report import lines
from minisd.lab.weights.scan import scan
from tests.unit.tiny import compvis_tensors, tiny_model

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """A whole model under CompVis' names."""
    return compvis_tensors(tiny_model(), tmp_path_factory.mktemp("tiny"))


def report_on(tensors, path, **metadata):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return inspect(path)


def averaged(tensors):
    return {
        ema_name(name.removeprefix(UNET)): value.clone() for name, value in tensors.items() if name.startswith(UNET)
    }


def test_the_embedded_model():
    report = inspect("emoji")
    assert report.what.startswith("Stable Diffusion 1.x, a folder") and report.problem is None
    assert {name: len(part.sources) for name, part in report.parts.items()}.items() >= {"unet": 686, "vae": 248}.items()
    assert all(part.complete and part.dtypes.keys() == {"F16"} for part in report.parts.values())


def test_a_single_file(tensors, tmp_path):
    report = report_on(tensors, tmp_path / "m.safetensors")
    assert (report.what, report.problem, report.official) == ("Stable Diffusion 1.x", None, None)
    assert naming(report.parts["unet"]) == "CompVis, prefix 'model.diffusion_model.'"
    assert report.parts["unet"].parameters == sum(t.numel() for name, t in tensors.items() if name.startswith(UNET))
    assert report.bytes == (tmp_path / "m.safetensors").stat().st_size


def test_raw_and_averaged_weights(tensors, tmp_path):
    both = report_on(tensors | averaged(tensors), tmp_path / "both.safetensors")
    assert both.what.endswith("raw and averaged (EMA) weights") and "raw and averaged" in both.warnings[0]
    rest = {name: value for name, value in tensors.items() if not name.startswith(UNET)}
    alone = report_on(rest | averaged(tensors), tmp_path / "ema.safetensors")
    assert alone.what.endswith("averaged (EMA) weights only") and alone.problem is None


@pytest.mark.parametrize(("channels", "word"), ((9, "inpainting"), (8, "instruction"), (5, "depth")))
def test_channels_in(tensors, tmp_path, channels, word):
    name = UNET + "input_blocks.0.0.weight"
    wide = tensors | {name: torch.zeros(32, channels, 3, 3)}
    assert word in report_on(wide, tmp_path / "wide.safetensors").what


@pytest.mark.parametrize(
    ("prefix", "what", "absent"),
    (
        ("first_stage_model.", "VAE only", "no UNet and no text encoder"),
        ("cond_stage_model.", "text encoder only", "no UNet and no VAE"),
        (UNET, "UNet only, of Stable Diffusion 1.x", "no VAE and no text encoder"),
    ),
)
def test_one_component(tensors, tmp_path, prefix, what, absent):
    part = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    report = report_on(part, tmp_path / "part.safetensors")
    assert report.what == what and absent in report.problem


def test_what_is_missing_is_named(tensors, tmp_path):
    gone = UNET + "out.2.bias"
    report = report_on({name: value for name, value in tensors.items() if name != gone}, tmp_path / "m.safetensors")
    assert report.parts["unet"].missing == [gone] and gone in report.problem
    assert any("INCOMPLETE" in line for line in lines(report))


LORAS = {
    "kohya's names, plain": "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
    "kohya's names, LoCon (convolutions too)": "lora_unet_mid_block_resnets_0_conv1.lora_down.weight",
    "kohya's names, LoCon with Tucker decomposition": "lora_unet_mid_block_resnets_0_conv1.lora_mid.weight",
    "kohya's names, LoHa": "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a",
    "kohya's names, LoKr": "lora_unet_mid_block_attentions_0_proj_in.lokr_w1",
    "PEFT names, plain": "unet.mid_block.attentions.0.proj_in.lora_A.weight",
    "diffusers names, plain": "unet.mid_block.attentions.0.proj_in.lora.down.weight",
    "old diffusers names, plain": "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
}


@pytest.mark.parametrize("dialect", LORAS)
def test_loras_are_told_apart(tmp_path, dialect):
    report = report_on({LORAS[dialect]: torch.zeros(4, 32)}, tmp_path / "lora.safetensors")
    assert report.what == f"a LoRA, {dialect}" and "a LoRA" in report.problem


STRANGERS = {
    "a part of SDXL": "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    "SD 3 or Flux": "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
    "SD 2's depth model": "depth_model.model.pretrained.cls_token",
    "a ControlNet": "control_model.input_hint_block.0.weight",
    "a TAESD autoencoder": "taesd_decoder.1.weight",
    "a textual inversion embedding": "emb_params",
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_are_named(tmp_path, name):
    report = report_on({STRANGERS[name]: torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    assert report.what == name and name in report.problem


def test_leftovers_and_hints(tensors, tmp_path):
    beside = {"betas": torch.zeros(1000), "v_pred": torch.zeros(1), "my.own": torch.zeros(1)}
    report = report_on(tensors | beside, tmp_path / "m.safetensors", **{"modelspec.prediction_type": "v"})
    assert report.leftovers == {"schedule buffers": ["betas"], "sampler settings": ["v_pred"], "unknown": ["my.own"]}
    assert len(report.hints) == 2 and "my.own" in report.problem


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.float16, torch.bfloat16, torch.float32))
def test_damaged_position_ids(tensors, tmp_path, dtype):
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    ids = torch.arange(77)[None].to(dtype)
    assert not report_on(tensors | {name: ids}, tmp_path / "good.safetensors").warnings
    ids[0, 41] = 40
    assert "damaged" in report_on(tensors | {name: ids}, tmp_path / "bad.safetensors").warnings[0]


def test_values(tensors, tmp_path):
    """--deep finds what is planted, and nothing else."""
    half = {name: value.half() for name, value in tensors.items()}
    planted = dict(zip(("nan", "infinite", "saturated", "zero"), list(half), strict=False))
    for kind, value in (("nan", torch.nan), ("infinite", torch.inf), ("saturated", 65504.0)):
        half[planted[kind]].view(-1)[0] = value
    half[planted["zero"]].zero_()
    found = scan(report_on(half, tmp_path / "m.safetensors"))
    assert {kind: getattr(found, kind) for kind in planted} == {kind: [name] for kind, name in planted.items()}
    _, std = found.blocks["vae.encoder.conv_in"]
    assert std == pytest.approx(0.05, rel=0.2)


def hollow(path):
    """All of SD 1.5 with its averaged UNet: 7.7 GB on paper, and a hole on the disk where the values would be."""
    keys = [(COMPVIS_PREFIX[part] + key.compvis, key) for part in COMPONENTS for key in model_keys(SD15)[part]]
    keys += [(ema_name(key.compvis), key) for key in model_keys(SD15)["unet"]]
    header, end = {}, 0
    for name, key in keys:
        start, end = end, end + 4 * math.prod(key.compvis_shape)
        header[name] = {"dtype": "F32", "shape": list(key.compvis_shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def test_it_waits_neither_for_torch_nor_for_values(tmp_path):
    hollow(tmp_path / "sd15.safetensors")
    code = "import sys; sys.modules['torch'] = None\nfrom minisd.cli import main\nmain()"
    command = [sys.executable, "-c", code, "inspect", str(tmp_path / "sd15.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1,816 tensors, 7.70 GB" in done.stdout and "raw and averaged" in done.stdout


def test_what_is_no_weight_file_is_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(CheckpointError, match="HTML"):
        inspect(path)
    done = subprocess.run(["minisd", "inspect", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1


def test_the_commands():
    run = CliRunner().invoke
    told = json.loads(run(inspect_command, ["emoji", "--json"], catch_exceptions=False).output)
    assert told["parts"]["vae"]["complete"] is True and told["problem"] is None
    tree = run(inspect_command, ["--tree", "--depth", "2", "emoji"], catch_exceptions=False).output
    assert "  token_embedding " in tree and "256,000" in tree
    table = run(keys_command, ["--json"], catch_exceptions=False).output.splitlines()
    assert len(table) == 1130
    rows = run(keys_command, ["emoji", "--grep", "conv_out"], catch_exceptions=False).output.splitlines()
    assert len(rows) == 1 + 6 and rows[0].split()[0] == "minisd"


def test_deep_with_numbers_that_torch_cannot_compute_with(tmp_path):
    """4-bit floats beside a model are listed, not looked at."""
    text = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0")
    findings = scan(inspect(tmp_path / "x.safetensors"))
    assert findings.zero == [] and len(findings.sha256) == 1
