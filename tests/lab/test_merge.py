"""`minisd merge`: the arithmetic, block by block; what is not a weight stays; the recipe is told; little memory."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minisd import CheckpointError, StableDiffusion
from minisd.cli.weights import merge as merge_command
from minisd.lab.weights.merge import merge
from tests.adapters.makers import lora
from tests.unit.tiny import tiny_model

IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
OUT_BIAS = "model.diffusion_model.out.2.bias"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """a, b, c and a 9-channel model as single files, b as a folder too."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("abc"):
        tiny_model(seed).save(folder / f"{name}.safetensors", layout="compvis")
    tiny_model(1).save(folder / "b")
    tiny_model(3, in_channels=9).save(folder / "inpainting.safetensors", layout="compvis")
    return folder


def state(path):
    return StableDiffusion.load(path, dtype=None).state()


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_weighted_sum(models, tmp_path):
    """Across layouts; exact at both ends."""
    a, b = state(models / "a.safetensors"), state(models / "b")
    for weight in (0.0, 0.3, 1.0):
        mixed = state(merge(models / "a.safetensors", models / "b", tmp_path / f"{weight}.safetensors", weight=weight))
        for name, tensor in mixed.items():
            assert torch.allclose(tensor, (1 - weight) * a[name] + weight * b[name], atol=1e-7, rtol=1e-6)
            assert weight == 0.3 or torch.equal(tensor, (a, b)[int(weight)][name])


def test_a_model_mixed_with_itself_is_itself(models, tmp_path):
    """(1 - w) A + w A rounds; minisd's sum does not."""
    mixed = state(merge(models / "a.safetensors", models / "a.safetensors", tmp_path / "aa.safetensors", weight=0.3))
    assert all(torch.equal(tensor, mixed[name]) for name, tensor in state(models / "a.safetensors").items())


def test_a_difference_added(models, tmp_path):
    a, b, c = (state(models / f"{name}.safetensors") for name in "abc")
    source = models / "c.safetensors"
    mixed = state(merge(models / "a.safetensors", models / "b", tmp_path / "d", minus=source, weight=0.7))
    for name, tensor in mixed.items():
        assert torch.equal(tensor, a[name] + 0.7 * (b[name] - c[name]))


def test_an_arc(models, tmp_path):
    """The middle of the arc: as far from both, and for two ends of one length as long as they are."""
    a, b = state(models / "a.safetensors"), state(models / "b")
    mixed = state(merge(models / "a.safetensors", models / "b", tmp_path / "s", slerp=True))
    for name, tensor in mixed.items():
        x, y = a[name].double().flatten(), b[name].double().flatten()
        angle = torch.arccos(x @ y / x.norm() / y.norm())
        expected = (x + y) * torch.sin(angle / 2) / torch.sin(angle)
        assert torch.allclose(tensor.double().flatten(), expected, atol=1e-6)


def test_an_arc_between_equals_is_no_division_by_zero(models, tmp_path):
    mixed = state(merge(models / "a.safetensors", models / "a.safetensors", tmp_path / "s", slerp=True))
    for name, tensor in state(models / "a.safetensors").items():
        assert torch.allclose(mixed[name], tensor, rtol=1e-6)


def test_shares_by_block(models, tmp_path):
    """25 numbers: IN00 .. IN11, M00, OUT00 .. OUT11, in CompVis' numbering; all the rest takes the weight."""
    blocks = [n / 24 for n in range(25)]
    a, b = load_file(models / "a.safetensors"), load_file(models / "b.safetensors")
    target = merge(models / "a.safetensors", models / "b", tmp_path / "blocks.safetensors", blocks=blocks, weight=0.25)
    mixed = load_file(target)
    unet = "model.diffusion_model."
    expected = {
        f"{unet}input_blocks.0.0.weight": 0,
        f"{unet}time_embed.0.weight": 0,
        f"{unet}input_blocks.7.0.in_layers.2.weight": 7,
        f"{unet}middle_block.1.proj_in.weight": 12,
        f"{unet}output_blocks.0.0.in_layers.2.weight": 13,
        f"{unet}output_blocks.11.1.proj_out.weight": 24,
        OUT_BIAS: 24,
    }
    for name, block in expected.items():
        assert torch.equal(mixed[name], torch.lerp(a[name], b[name], block / 24)), name
    for name in (
        "first_stage_model.quant_conv.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ):
        assert torch.equal(mixed[name], torch.lerp(a[name], b[name], 0.25))


def test_26_numbers_have_the_rest_in_front(models, tmp_path):
    target = tmp_path / "26.safetensors"
    merge(models / "a.safetensors", models / "b", target, blocks=[1.0] + [0.0] * 25)
    a, b, mixed = (load_file(path) for path in (models / "a.safetensors", models / "b.safetensors", target))
    for name, tensor in mixed.items():
        assert torch.equal(tensor, (a if name.startswith("model.") else b)[name])


def test_another_component(models, tmp_path):
    target = merge(models / "a.safetensors", None, tmp_path / "x.safetensors", take={"vae": models / "b"})
    a, b, mixed = state(models / "a.safetensors"), state(models / "b"), state(target)
    assert all(torch.equal(mixed[name], (b if name.startswith("vae") else a)[name]) for name in mixed)
    merge(models / "a.safetensors", None, tmp_path / "y", take={"unet": models / "b", "text_encoder": models / "b"})
    assert all(torch.equal(t, (a if n.startswith("vae") else b)[n]) for n, t in state(tmp_path / "y").items())


def test_a_vae_alone_mixes_into_the_vae_alone(models, tmp_path):
    vae = {n: t for n, t in load_file(models / "b.safetensors").items() if n.startswith("first_stage_model")}
    save_file(vae, tmp_path / "vae.safetensors")
    merge(models / "a.safetensors", tmp_path / "vae.safetensors", tmp_path / "x.safetensors", weight=1.0)
    a, b, mixed = state(models / "a.safetensors"), state(models / "b"), state(tmp_path / "x.safetensors")
    assert all(torch.equal(mixed[name], (b if name.startswith("vae") else a)[name]) for name in mixed)


def test_an_inpainting_model_learns_from_a_plain_one(models, tmp_path):
    """The recipe people use: A = inpainting, plus (B - C) of plain models; the mask's channels stay A's."""
    paths = models / "inpainting.safetensors", models / "b", tmp_path / "x.safetensors"
    mixed = state(merge(*paths, minus=models / "c.safetensors", weight=1.0))
    a, b, c = (state(models / name) for name in ("inpainting.safetensors", "b", "c.safetensors"))
    name = "unet.conv_in.weight"
    assert torch.equal(mixed[name][:, :4], a[name][:, :4] + (b[name] - c[name]))
    assert torch.equal(mixed[name][:, 4:], a[name][:, 4:])
    arc = state(merge(*paths, slerp=True))[name]
    assert not torch.equal(arc[:, :4], a[name][:, :4]) and torch.equal(arc[:, 4:], a[name][:, 4:])
    with pytest.raises(CheckpointError, match=r"conv_in.weight.*give the inpainting model as A"):
        merge(models / "b", models / "inpainting.safetensors", tmp_path / "y")


def test_loras_are_baked_in(models, tmp_path):
    """As `sd.load_lora` and `sd.save` do it, into the mixture and into the taken component."""
    sd = StableDiffusion.load(models / "a.safetensors")
    path, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    save_file(lora(sd.config, "kohya", rank=2, seed=1), path)
    save_file(lora(sd.config, "peft", rank=3, seed=2), other)
    sd.load_lora(path, 0.5)
    sd.load_lora(other, -1.0)
    sd.save(tmp_path / "baked")
    target = merge(models / "a.safetensors", None, tmp_path / "x.safetensors", loras=[(path, 0.5), (other, -1.0)])
    expected, before = state(tmp_path / "baked"), state(models / "a.safetensors")
    changed = 0
    for name, tensor in state(target).items():
        assert torch.equal(tensor, expected[name]), name
        changed += not torch.equal(tensor, before[name])
    assert changed > 100
    told = json.loads(metadata_of(target)["minisd.merge"])
    assert told["recipe"]["loras"][0] == {"name": "one.safetensors", "scale": 0.5}
    assert set(told["sources"]["loras"]) == {"one.safetensors", "other.safetensors"}


def test_two_loras_of_one_name_are_both_in_the_recipe(models, tmp_path):
    config = StableDiffusion.load(models / "a.safetensors").config
    paths = [tmp_path / name / "x.safetensors" for name in ("one", "two")]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        save_file(lora(config, "kohya", rank=1, seed=seed), path)
    target = merge(models / "a.safetensors", None, tmp_path / "x.safetensors", loras=[(path, 1.0) for path in paths])
    assert len(set(json.loads(metadata_of(target)["minisd.merge"])["sources"]["loras"].values())) == 2


def test_what_is_no_weight_and_each_dtype_stays(models, tmp_path):
    """Integers are not averaged, and a half stays a half; averaged weights of A would be false now."""
    a, b = load_file(models / "a.safetensors"), load_file(models / "b.safetensors")
    metadata = metadata_of(models / "a.safetensors") | {"author": "somebody"}
    a = {name: t.half() if name.startswith("first") else t for name, t in a.items()}
    ema = {"model_ema.diffusion_modelout2bias": torch.zeros(4), "model_ema.num_updates": torch.tensor(5)}
    save_file(a | ema | {IDS: torch.arange(77)[None]}, tmp_path / "a.safetensors", metadata)
    save_file(b | {IDS: torch.full((1, 77), 3.7)}, tmp_path / "b.safetensors")
    merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "ab.safetensors")
    mixed = load_file(tmp_path / "ab.safetensors")
    assert mixed.keys() == a.keys() | {IDS}
    assert metadata.items() <= metadata_of(tmp_path / "ab.safetensors").items()
    assert torch.equal(mixed[IDS], torch.arange(77)[None])
    assert all(mixed[name].dtype == tensor.dtype for name, tensor in a.items())
    merge(tmp_path / "a.safetensors", models / "b", tmp_path / "bf", dtype=torch.bfloat16)
    assert {t.dtype for t in state(tmp_path / "bf").values()} == {torch.bfloat16}


@pytest.mark.parametrize("target", ["x.safetensors", "folder"])
def test_the_recipe_is_in_the_metadata(models, tmp_path, target):
    path = merge(models / "a.safetensors", models / "b", tmp_path / target, weight=0.3, slerp=True)
    path = path if path.is_file() else path / "vae" / "diffusion_pytorch_model.safetensors"
    told = json.loads(metadata_of(path)["minisd.merge"])
    assert told["recipe"]["weight"] == 0.3 and told["recipe"]["slerp"] is True
    digest = hashlib.sha256((models / "a.safetensors").read_bytes()).hexdigest()
    assert told["sources"]["A"] == {"a.safetensors": digest}
    assert set(told["sources"]["B"]) == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }


BAD = {
    "alone": (["a.safetensors", "x.safetensors"], "nothing to do"),
    "three": (["a.safetensors", "b", "c.safetensors", "x.safetensors"], "takes two models"),
    "both ways": (["a.safetensors", "b", "x", "--slerp", "--minus", "c.safetensors"], "exclude each other"),
    "24 blocks": (["a.safetensors", "b", "x", "--blocks", ",".join(["0"] * 24)], "this UNet has 25 blocks"),
    "words": (["a.safetensors", "b", "x", "--blocks", "much"], "not a list of numbers"),
    "nan": (["a.safetensors", "b", "x", "-w", "nan"], "must be a finite number"),
    "take": (["a.safetensors", "x", "--take", "vae"], "is not COMPONENT=PATH"),
    "no component": (["a.safetensors", "x", "--take", "head=b"], "must be one of unet, vae, text_encoder"),
    "absent": (["a.safetensors", "nothing.safetensors", "x"], "no such file"),
    "taken twice": (["a.safetensors", "x", "--take", "vae=b", "--take", "vae=c.safetensors"], "is there twice"),
    "onto itself": (["a.safetensors", "b", "b"], "would replace b, which is read"),
    "a LoRA as A": (["lora.safetensors", "b", "x.safetensors"], "is a LoRA"),
    "integers as B": (["a.safetensors", "integers.safetensors", "x"], "not floating point"),
    "no model": (["a.safetensors", "other.safetensors", "x"], "holds no part of Stable Diffusion"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_requests_leave_nothing(models, tmp_path, monkeypatch, arguments, message):
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    integers = {OUT_BIAS: torch.zeros(4, dtype=torch.int8)}
    save_file(load_file(tmp_path / "b.safetensors") | integers, tmp_path / "integers.safetensors")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = subprocess.run([sys.executable, "-m", "minisd", "merge", *arguments], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(models, tmp_path):
    target = tmp_path / "x.safetensors"
    arguments = [str(models / "a.safetensors"), str(models / "b"), str(target), "-w", "0.3", "-q"]
    result = CliRunner().invoke(merge_command, arguments, catch_exceptions=False)
    assert result.output.splitlines()[-1] == str(target)
    merge(models / "a.safetensors", models / "b", tmp_path / "y.safetensors", weight=0.3)
    assert target.read_bytes() == (tmp_path / "y.safetensors").read_bytes()


@pytest.mark.parametrize(("b", "c"), (("b", "inpainting"), ("inpainting", "b")))
def test_a_difference_that_does_not_exist(models, tmp_path, b, c):
    """Of a model with 9 channels in and one with 4: told in names, before anything is written."""
    a, b, c = (models / f"{name}.safetensors" for name in ("inpainting", b, c))
    with pytest.raises(CheckpointError, match=r"conv_in\.weight.*C's is .*no difference") as caught:
        merge(a, b, tmp_path / "x.safetensors", minus=c)
    assert str(b) in str(caught.value) and str(c) in str(caught.value) and list(tmp_path.iterdir()) == []


def test_two_that_predict_different_things_are_told(models, tmp_path):
    plain = {name: text for name, text in metadata_of(models / "b.safetensors").items() if name != "minisd.config"}
    config = json.loads(metadata_of(models / "b.safetensors")["minisd.config"])
    config["scheduler"]["prediction_type"] = "v_prediction"
    told = plain | {"minisd.config": json.dumps(config), "modelspec.prediction_type": "v"}
    save_file(load_file(models / "b.safetensors"), tmp_path / "v.safetensors", told)
    arguments = [str(models / "a.safetensors"), str(tmp_path / "v.safetensors"), str(tmp_path / "x.safetensors"), "-q"]
    result = CliRunner().invoke(merge_command, arguments, catch_exceptions=False)
    assert "A's UNet predicts epsilon, B's v_prediction" in result.stderr


MEMORY = """
import resource, sys, torch
from minisd.lab.weights.merge import merge
merge(sys.argv[1], sys.argv[1], sys.argv[3], weight=0.1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(sys.argv[2], sys.argv[2], sys.argv[3], weight=0.1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_holds_a_few_rows(models, tmp_path):
    """A model with a tensor of 200 MB: no more than 100 MB are needed, and neither A nor B is ever whole in memory."""
    tensors = load_file(models / "a.safetensors")
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    metadata = metadata_of(models / "a.safetensors")
    config = json.loads(metadata["minisd.config"])
    config["text_encoder"]["vocab_size"] = 800_000
    metadata["minisd.config"] = json.dumps(config)
    large = tmp_path / "large.safetensors"
    save_file(tensors | {name: torch.randn(800_000, 64)}, large, metadata)
    arguments = [sys.executable, "-c", MEMORY, models / "a.safetensors", large, tmp_path / "x.safetensors"]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 100_000_000
