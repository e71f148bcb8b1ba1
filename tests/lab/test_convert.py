"""`minisd convert`: any layout to any layout, nothing lost, nothing half-written, little memory."""

import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minisd import StableDiffusion
from minisd.lab.commands import convert as convert_command
from minisd.lab.converting import convert
from tests.unit.tiny import compvis_tensors, equal, tiny_model

BESIDE = {
    "betas": torch.linspace(0, 1, 1000),
    "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    """A single file, mixed in dtypes, with leftovers and metadata."""
    folder = tmp_path_factory.mktemp("single")
    tensors = compvis_tensors(model, folder)
    with safe_open(folder / "tiny.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor.half() if name.startswith("first") else tensor for name, tensor in tensors.items()}
    save_file(tensors | BESIDE, folder / "single.safetensors", metadata | {"author": "somebody"})
    return folder / "single.safetensors"


def contents(path):
    """Everything in a file: values, and metadata."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def same(one, other):
    (tensors, metadata), (others, more) = contents(one), contents(other)
    equal_values = all(t.dtype == others[name].dtype and torch.equal(t, others[name]) for name, t in tensors.items())
    return tensors.keys() == others.keys() and metadata == more and equal_values


def test_there_and_back_again(single, tmp_path):
    """CompVis -> diffusers -> CompVis: the same tensors, names, dtypes and metadata."""
    convert(single, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(single, tmp_path / "back.safetensors")


def test_both_layouts_load(model, single, tmp_path):
    convert(single, tmp_path / "folder", dtype=torch.float32)
    folder = StableDiffusion.load(tmp_path / "folder")
    assert equal(folder, model, ["unet", "text_encoder"])
    assert torch.equal(folder.vae.decoder.conv_in.weight, model.vae.decoder.conv_in.weight.half().float())


def test_diffusers_loads_the_folder_and_the_file(twin, tmp_path):
    """A narrow twin of SD 1.5 -> one file -> a folder: diffusers finds its own weights again."""
    diffusers = pytest.importorskip("diffusers")
    _, folder = twin
    convert(folder, tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "again")
    settings = {"safety_checker": None, "requires_safety_checker": False}
    load = diffusers.StableDiffusionPipeline.from_pretrained
    pipes = load(folder, **settings), load(tmp_path / "again", **settings)
    for part in ("unet", "vae", "text_encoder"):
        states = [getattr(pipe, part).state_dict() for pipe in pipes]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_dtypes(model, single, tmp_path, dtype):
    convert(single, tmp_path / "half.safetensors", dtype=dtype)
    tensors, _ = contents(tmp_path / "half.safetensors")
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(tensors[name], model.unet.conv_out.weight.to(dtype))
    assert {t.dtype for key, t in tensors.items() if key not in BESIDE} == {dtype}


def test_lean_leaves_out_what_is_not_the_model(single, tmp_path):
    convert(single, tmp_path / "lean.safetensors", lean=True)
    tensors, metadata = contents(tmp_path / "lean.safetensors")
    assert not BESIDE.keys() & tensors.keys() and "author" not in metadata
    StableDiffusion.load(tmp_path / "lean.safetensors")


def test_raw_or_averaged(single, tmp_path):
    from tests.lab.test_inspect import averaged

    tensors, metadata = contents(single)
    average = {name: value + 1 for name, value in averaged(tensors).items()}
    save_file(tensors | average, tmp_path / "both.safetensors", metadata)
    for weights, offset in (("raw", 0), ("ema", 1)):
        convert(tmp_path / "both.safetensors", tmp_path / weights, weights=weights, lean=True)
        unet = load_file(tmp_path / weights / "unet" / "diffusion_pytorch_model.safetensors")
        assert torch.equal(unet["conv_out.bias"], tensors["model.diffusion_model.out.2.bias"] + offset)


def test_shards(model, single, tmp_path):
    convert(single, tmp_path / "folder", shard_size=300_000, dtype=torch.float32)
    shards = sorted((tmp_path / "folder" / "unet").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name.endswith(f"-00001-of-{len(shards):05}.safetensors")
    assert equal(StableDiffusion.load(tmp_path / "folder"), model, ["unet"])


@pytest.mark.parametrize("layout", ("diffusers", "compvis"))
@pytest.mark.parametrize("component", ("unet", "vae", "text_encoder"))
def test_one_component(single, tmp_path, component, layout):
    convert(single, tmp_path / "part.safetensors", component=component, layout=layout)
    tensors, _ = contents(tmp_path / "part.safetensors")
    prefix = {"unet": "model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}[component]
    assert all(name.startswith(prefix) == (layout == "compvis") for name in tensors)
    convert(tmp_path / "part.safetensors", tmp_path / "folder", component=component)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert {"_class_name", "model_type"} & config.keys()


def test_a_failure_leaves_nothing(single, tmp_path):
    """The disk is full after a while: no result, no temporary file, and what stood there before still stands."""
    (tmp_path / "old.safetensors").write_bytes(single.read_bytes())

    def fail(_: int) -> None:
        raise OSError("No space left on device")

    for target in (tmp_path / "old.safetensors", tmp_path / "folder"):
        with pytest.raises(OSError, match="No space"):
            convert(single, target, advance=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["old.safetensors"]
    assert same(single, tmp_path / "old.safetensors")


def test_impossible_wishes(single, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("mine")
    for settings in (
        {"target": tmp_path / "taken"},
        {"target": tmp_path / "x.safetensors", "layout": "diffusers"},
        {"target": tmp_path / "x.safetensors", "shard_size": 5},
        {"target": tmp_path / "x", "layout": "sdxl"},
        {"target": tmp_path / "x", "component": "lora"},
        {"target": tmp_path / "x", "dtype": torch.int8},
    ):
        with pytest.raises((ValueError, FileExistsError)):
            convert(single, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_command(single, tmp_path):
    done = CliRunner().invoke(convert_command, [str(single), str(tmp_path / "f"), "--shard-size", "1MB", "--quiet"])
    assert done.exit_code == 0 and done.output == f"{tmp_path / 'f'}\n"
    refused = CliRunner().invoke(convert_command, [str(single), str(tmp_path / "g"), "--shard-size", "big"])
    assert refused.exit_code == 2 and "is not a size" in refused.output


MEASURE = """
import resource, sys
from minisd.lab.converting import convert
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], dtype=getattr(torch, sys.argv[3], None))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts in other units elsewhere")
@pytest.mark.parametrize("dtype", ("None", "float16"))
def test_memory_does_not_grow_with_the_file(tmp_path, dtype):
    """400 MB are converted; what is in memory at once is far less."""
    tensors, metadata = contents_of_tiny(tmp_path)
    big = {f"control_model.{i}": torch.zeros(10_000_000) for i in range(10)}
    save_file(tensors | big, tmp_path / "big.safetensors", metadata)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big.safetensors"), str(tmp_path / "out"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert int(done.stdout) * 1024 < 240_000_000


def contents_of_tiny(folder):
    compvis_tensors(tiny_model(), folder)
    return contents(folder / "tiny.safetensors")
