"""`minisd lora extract`: what baking put in comes out again, in little, and other programs read it."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import minisd
from minisd.lab.weights.extract import LARGEST, extract, factored
from tests.adapters.makers import attention, everything, lora, write
from tests.unit.tiny import tiny_model

X, T = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
CONTEXT = torch.randn(1, 77, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A model, and the same with a rank-4 LoRA of all layers baked in: in different layouts."""
    place = tmp_path_factory.mktemp("pair")
    sd = tiny_model()
    sd.save(place / "a")
    sd.load_lora(write(place / "true.safetensors", lora(sd.config, pick=everything, spread=0.1, alpha=3.0)))
    sd.save(place / "b.safetensors", layout="compvis")
    return place


@torch.no_grad()
def generated(sd) -> torch.Tensor:
    return sd.unet(X, T, sd.text_encoder(sd.tokenizer(["red"])) + CONTEXT)


def test_what_was_baked_is_recovered(models, tmp_path):
    """Rank 4 holds a rank-4 change: to float32's rounding in float32, to float16's in float16."""
    truth = minisd.StableDiffusion.load(models / "a").load_lora(models / "true.safetensors").changes
    for dtype, bound in ((torch.float32, 5e-6), (torch.float16, 1e-3)):  # measured: 7e-7 and 3.5e-4
        done = extract(models / "a", models / "b.safetensors", rank=4, target=tmp_path / "e.safetensors", dtype=dtype)
        assert {name: kept.layers for name, kept in done.components.items()} == {"unet": 280, "text_encoder": 12}
        assert all(kept.energy > 0.999999 and kept.outside == 0 for kept in done.components.values())
        found = minisd.StableDiffusion.load(models / "a").load_lora(done.path).changes
        assert found.keys() == truth.keys()
        worst = max(
            ((found[weight].delta() - truth[weight].delta()).norm() / truth[weight].delta().norm()).item()
            for weight in truth
        )
        assert worst < bound, worst


def test_the_model_with_it_generates_like_the_tuned_one(models, tmp_path):
    done = extract(models / "a", models / "b.safetensors", rank=4, target=tmp_path / "e.safetensors")
    sd, tuned = minisd.StableDiffusion.load(models / "a"), minisd.StableDiffusion.load(models / "b.safetensors")
    plain, wanted = generated(sd), generated(tuned)
    sd.load_lora(done.path)
    assert (plain - wanted).norm() > 0.05 * wanted.norm()
    assert (generated(sd) - wanted).norm() < 1e-3 * (plain - wanted).norm()  # measured: 3.2e-4, float16's rounding


def test_a_smaller_rank_keeps_the_largest_part(models, tmp_path):
    """Exactly what the singular values say, and more with every rank."""
    energies = []
    for rank in (1, 2, 3):
        done = extract(models / "a", models / "b.safetensors", rank=rank, target=tmp_path / "e.safetensors")
        kept = done.components["unet"]
        energies.append(kept.energy)
        assert kept.error == pytest.approx((1 - kept.energy) ** 0.5)
    assert 0.2 < energies[0] < energies[1] < energies[2] < 0.99
    a, b = (minisd.StableDiffusion.load(models / name).unet.state_dict() for name in ("a", "b.safetensors"))
    layers = [name for name in a if a[name].ndim >= 2]
    squares = [torch.linalg.svdvals((b[name] - a[name]).flatten(1).double()).square() for name in layers]
    exact = sum(float(values[:3].sum()) for values in squares) / sum(float(values.sum()) for values in squares)
    assert energies[2] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("shape", [(40, 24), (16, 40), (24, 16, 3, 3), (8, 8, 1, 1), (3, 5)])
def test_factors_are_the_best_ones(shape):
    """Eckart and Young: no closer matrices of this rank. And the same ones every time."""
    torch.manual_seed(1)
    difference = torch.randn(shape) * torch.linspace(0.2, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    down, up, energy = factored(difference, 4)
    values = torch.linalg.svdvals(difference.flatten(1))
    left = difference.flatten(1) - up.flatten(1) @ down.flatten(1)
    assert left.square().sum() == pytest.approx(values[4:].square().sum().item(), rel=1e-2, abs=1e-4)
    assert energy == pytest.approx(values[:4].square().sum().item(), rel=1e-3)
    torch.manual_seed(2)  # whatever else is drawn in between
    before = torch.random.get_rng_state()
    again = factored(difference, 4)
    assert torch.equal(again[0], down) and torch.equal(again[1], up)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_metadata_tell_where_it_comes_from(models, tmp_path):
    done = extract(models / "a", models / "b.safetensors", rank=2, target=tmp_path / "e.safetensors")
    with safe_open(done.path, "pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["minisd.extract"])
    assert facts["rank"] == 2 and facts["sources"]["b"]["name"] == "b.safetensors"
    (digest,) = facts["sources"]["b"]["sha256"].values()
    assert digest == hashlib.sha256((models / "b.safetensors").read_bytes()).hexdigest()
    assert len(facts["sources"]["a"]["sha256"]) == 2  # UNet and text encoder
    assert facts["relative_error"]["unet"] == pytest.approx(done.components["unet"].error, abs=1e-6)
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "2"
    assert all(tensor.item() == 2 for name, tensor in load_file(done.path).items() if name.endswith(".alpha"))


def test_what_no_lora_holds_is_counted(models, tmp_path):
    """Norms, biases and the table of tokens; the VAE is none of its business."""
    sd = minisd.StableDiffusion.load(models / "a")
    with torch.no_grad():
        sd.unet.norm_out.weight.add_(1)
        sd.text_encoder.token_embedding.weight.add_(1)
        sd.vae.quant_conv.weight.add_(1)
        sd.unet.conv_in.weight.add_(0.1)
    sd.save(tmp_path / "c")
    done = extract(models / "a", tmp_path / "c", rank=2, target=tmp_path / "e.safetensors")
    assert {name: (kept.layers, kept.outside) for name, kept in done.components.items()} == {
        "unet": (1, 1),
        "text_encoder": (0, 1),
    }
    assert sorted(load_file(done.path)) == [f"lora_unet_conv_in.{end}" for end in
                                            ("alpha", "lora_down.weight", "lora_up.weight")]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_diffusers_loads_the_result(pair, twin, inputs, tmp_path):
    """Extracted from the twin with a LoRA of its attention: both programs generate the same with it."""
    theirs, ours = pair
    ours.load_lora(write(tmp_path / "true.safetensors", lora(ours.config, pick=attention)))
    ours.save(tmp_path / "tuned")
    ours.unload_lora()
    done = extract(twin[1], tmp_path / "tuned", rank=3, target=tmp_path / "e.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name="e.safetensors")
    ours.load_lora(done.path)
    try:
        with torch.no_grad():
            latents, timestep, context = inputs
            assert torch.equal(theirs.unet(latents, timestep, context).sample, ours.unet(latents, timestep, context))
            ids = ours.tokenizer(["a red cat"])
            assert torch.equal(theirs.text_encoder(ids)[0], ours.text_encoder(ids))
    finally:
        theirs.unload_lora_weights()
        ours.unload_lora()


def test_what_cannot_be_extracted(models, tmp_path):
    with pytest.raises(minisd.CheckpointError, match="do not differ in any layer"):
        extract(models / "a", models / "a", rank=2, target=tmp_path / "e.safetensors")
    with pytest.raises(minisd.CheckpointError, match=r"differ in shape at conv_in\.weight"):
        tiny_model(in_channels=9).save(tmp_path / "nine")
        extract(models / "a", tmp_path / "nine", rank=2, target=tmp_path / "e.safetensors")
    with pytest.raises(minisd.CheckpointError, match="LoRA"):
        extract(models / "a", models / "true.safetensors", rank=2, target=tmp_path / "e.safetensors")
    with pytest.raises(FileNotFoundError):
        extract(models / "a", models / "nowhere.safetensors", rank=2, target=tmp_path / "e.safetensors")
    for rank, target in ((0, "e.safetensors"), (2, "e.pt"), (2, "folder.safetensors")):
        (tmp_path / "folder.safetensors").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"must|is a folder"):
            extract(models / "a", models / "b.safetensors", rank=rank, target=tmp_path / target)
    assert not (tmp_path / "e.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e9])
@pytest.mark.parametrize("weight", ["conv_in", "norm_out"])
def test_numbers_that_no_lora_holds(models, tmp_path, value, weight):
    """The file and the weight are named, whichever side they are on; a finite one is a matter of both."""
    sd = minisd.StableDiffusion.load(models / "a")
    with torch.no_grad():
        sd.unet.get_submodule(weight).weight[0] = value
    sd.save(tmp_path / "broken")
    sides = [models / "a", tmp_path / "broken"]
    said = "differs by more than a LoRA can hold" if value == 3e9 else "holds NaN or infinite numbers"
    for pair in (sides, sides[::-1], *([[sides[1]] * 2] if value != 3e9 else [])):
        with pytest.raises(minisd.CheckpointError, match=rf"broken/unet/.*\.safetensors.*{weight}\.weight {said}"):
            extract(*pair, rank=2, target=tmp_path / "e.safetensors")
    assert not (tmp_path / "e.safetensors").exists()


def test_a_difference_that_is_just_held(models, tmp_path):
    """At the limit of what is taken, the factors are finite in float16."""
    sd = minisd.StableDiffusion.load(models / "a")
    with torch.no_grad():
        sd.unet.conv_in.weight[0, 0, 0, 0] = 0.99 * LARGEST
    sd.save(tmp_path / "large")
    done = extract(models / "a", tmp_path / "large", rank=1, target=tmp_path / "e.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(done.path).values())
    assert done.components["unet"].energy == pytest.approx(1)


def test_a_model_with_learnt_words(models, tmp_path):
    sd = minisd.StableDiffusion.load(models / "a")
    sd.load_embedding(torch.ones(3, 64), "<x>")
    sd.save(tmp_path / "taught")
    for a, b, letter in ((models / "a", tmp_path / "taught", "B"), (tmp_path / "taught", models / "a", "A")):
        with pytest.raises(minisd.CheckpointError, match=f"token_embedding.weight: {letter} has 3 added tokens more"):
            extract(a, b, rank=2, target=tmp_path / "e.safetensors")
