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
from minisd.checkpoint.load import open_alone
from minisd.cli.weights import convert as convert_command
from minisd.lab.weights.convert import convert
from minisd.lab.weights.inspect import inspect
from minisd.lab.weights.streaming import Entry, Made, write_file
from minisd.lab.zoo import write_zoo
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
from minisd.checkpoint.load import open_alone
from minisd.lab.weights.convert import convert
from minisd.lab.weights.streaming import Entry, Made, write_file
from minisd.lab.weights.inspect import inspect
from minisd.lab.zoo import write_zoo
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


# ------------------------------------------------ nothing is lost


def entries(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_minisd_wrote_is_replaced(single, tmp_path):
    """A folder with anything else in it stays, whatever it is called; so does a folder where a file is asked for."""
    cases = {
        "project": {"config.json": "{}", "src/thesis.txt": "x"},
        "repository": {"README.md": "x"},
        "checked": {"safety_checker/config.json": "{}"},
    }
    for name, files in cases.items():
        folder = tmp_path / name
        if name != "project":
            convert(single, folder)
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        before = entries(folder)
        with pytest.raises(FileExistsError, match="did not write; choose another name"):
            convert(single, folder)
        assert entries(folder) == before
    convert(single, tmp_path / "own")
    convert(single, tmp_path / "own")  # a whole model of minisd's is replaced
    with pytest.raises(FileExistsError, match="minisd did not write"):
        convert(single, tmp_path / "own", component="unet")
    (tmp_path / "own").rename(tmp_path / "own.safetensors")
    with pytest.raises(FileExistsError, match=r"is no \.safetensors file"):
        convert(single, tmp_path / "own.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FileExistsError, match=r"is no \.safetensors file"):
        convert(single, tmp_path / "pipe.safetensors")


def test_a_source_is_never_replaced(single, tmp_path):
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(single.read_bytes())
    convert(single, tmp_path / "folder")
    for source, target, settings in (
        (mine, mine, {"dtype": torch.float16}),
        (tmp_path / "folder", tmp_path / "folder", {}),
        (tmp_path / "folder" / "vae", tmp_path / "folder", {"component": "vae"}),
    ):
        with pytest.raises((ValueError, FileExistsError), match="choose another name"):
            convert(source, target, **settings)
    assert mine.read_bytes() == single.read_bytes()


def test_a_folders_own_settings_are_the_ones_that_count(single, tmp_path):
    """What was changed in a folder is so in the file that is made of it; the file's other metadata comes along."""
    convert(single, tmp_path / "folder")
    schedule, vae = tmp_path / "folder/scheduler/scheduler_config.json", tmp_path / "folder/vae/config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"prediction_type": "v_prediction"}))
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": 0.5}))
    back = convert(tmp_path / "folder", tmp_path / "back.safetensors")
    sd = StableDiffusion.load(back)
    assert sd.config.scheduler["prediction_type"] == "v_prediction" and sd.vae.scaling_factor == 0.5
    assert contents(back)[1]["author"] == "somebody"


@pytest.fixture(scope="module")
def community(model, tmp_path_factory):
    """A file as strangers write them: no settings in it, and none that its shapes do not tell."""
    path = tmp_path_factory.mktemp("community") / "model.safetensors"
    tensors = compvis_tensors(model, path.parent)
    table = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    tensors[table] = torch.randn(49408, 64)
    save_file(tensors | BESIDE | {"v_pred": torch.zeros(1)}, path, {"author": "somebody"})
    return path


def test_settings_are_added_where_the_shapes_do_not_tell_them(community, tmp_path):
    """There and back, a stranger's file is what it was; with another schedule it says so."""
    convert(community, tmp_path / "folder")
    assert same(community, convert(tmp_path / "folder", tmp_path / "back.safetensors"))
    schedule = tmp_path / "folder/scheduler/scheduler_config.json"
    schedule.write_text(json.dumps(json.loads(schedule.read_text()) | {"beta_end": 0.02}))
    back = convert(tmp_path / "folder", tmp_path / "other.safetensors")
    assert StableDiffusion.load(back).config.scheduler["beta_end"] == 0.02


def test_one_component_in_a_file_keeps_its_configuration(tmp_path):
    """The embedded model's scaling factor and norm groups leave no trace in shapes."""
    sd = StableDiffusion.load("emoji")
    for component in ("vae", "unet", "text_encoder"):
        for layout in ("diffusers", "compvis"):
            path = convert("emoji", tmp_path / f"{component}-{layout}.safetensors", component=component, layout=layout)
            found = open_alone(path, component)
            assert found.config == getattr(sd.config, component)
    assert StableDiffusion.load("emoji", vae=tmp_path / "vae-compvis.safetensors").vae.scaling_factor != 0.18215


def test_the_averaged_weights_of_two_sets(tmp_path):
    """To a file, and to a folder and back: the set that was not chosen would have the same names, and stays behind."""
    write_zoo(tmp_path / "zoo")
    source = tmp_path / "zoo" / "raw_and_ema.safetensors"
    averaged = StableDiffusion.load(source, weights="ema").state()
    convert(source, tmp_path / "ema.safetensors", weights="ema")
    convert(source, tmp_path / "folder", weights="ema")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    for path in ("ema.safetensors", "folder", "back.safetensors"):
        assert all(torch.equal(t, averaged[name]) for name, t in StableDiffusion.load(tmp_path / path).state().items())
    for name in ("fp8_scale_weight", "fp8_weight_scale"):
        path = convert(tmp_path / "zoo" / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
        assert not any("scale" in warning for warning in inspect(path).warnings)
        assert not any("scale" in name for name in contents(path)[0])


@pytest.mark.parametrize("kind", ("epsilon", "v_prediction"))
def test_what_the_unet_predicts_can_be_corrected(community, tmp_path, kind):
    """The source says v, by a tensor; the result says what was asked for, in both layouts."""
    convert(community, tmp_path / "folder", prediction=kind)
    convert(community, tmp_path / "file.safetensors", prediction=kind)
    for name in ("folder", "file.safetensors"):
        assert StableDiffusion.load(tmp_path / name).config.scheduler["prediction_type"] == kind
    arguments = [str(community), str(tmp_path / "other"), "--prediction", kind, "-q"]
    assert CliRunner().invoke(convert_command, arguments, catch_exceptions=False).exit_code == 0
    assert StableDiffusion.load(tmp_path / "other").config.scheduler["prediction_type"] == kind


def test_compvis_is_one_file(tmp_path):
    with pytest.raises(ValueError, match="the compvis layout is one file"):
        convert("emoji", tmp_path / "folder", layout="compvis")


def test_a_shard_index_is_a_source(single, tmp_path):
    convert(single, tmp_path / "folder", shard_size=500_000)
    index = tmp_path / "folder/unet/diffusion_pytorch_model.safetensors.index.json"
    convert(index, tmp_path / "unet.safetensors", component="unet", layout="diffusers")
    assert contents(tmp_path / "unet.safetensors")[0].keys() == {
        name for path in (tmp_path / "folder/unet").glob("*.safetensors") for name in contents(path)[0]
    }


def test_notes_are_shown(tmp_path):
    write_zoo(tmp_path / "zoo")
    arguments = [str(tmp_path / "zoo" / "raw_and_ema.safetensors"), str(tmp_path / "x.safetensors"), "-q"]
    result = CliRunner().invoke(convert_command, arguments, catch_exceptions=False)
    assert "warning: " in result.stderr and "the raw ones are used" in result.stderr


@pytest.mark.parametrize("size", ("0", "-1", "much", "9" * 400 + "GB", "1TB"))
def test_impossible_shard_sizes(single, tmp_path, size):
    command = [sys.executable, "-m", "minisd", "convert", str(single), str(tmp_path / "x"), "--shard-size", size]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "") and result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_name_that_comes_twice_is_refused(tmp_path):
    """Before thirds of a tensor are joined: there the second would be lost."""
    one = Entry("a", "F32", (1,), Made(lambda: [torch.zeros(1)]))
    with pytest.raises(ValueError, match="a name would be there twice"):
        write_file(tmp_path / "x.safetensors", [one, one], {})
