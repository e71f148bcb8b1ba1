"""`minisd.checkpoint.open` and `sd.state()`: looking at a checkpoint without reading it, and operating on a model."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import minisd.checkpoint
from minisd import CheckpointError, StableDiffusion
from minisd.checkpoint.keymap import COMPVIS_PREFIX, model_keys
from minisd.config import SD15
from tests.unit.tiny import tiny_model

NAME = "unet.down.4.attention.cross_attn.q.weight"
QUERY = "model.diffusion_model.input_blocks.5.1.transformer_blocks.0.attn2.to_q.weight"


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def single(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("lazy") / "model.safetensors"
    model.save(path, layout="compvis")
    return path


def test_any_of_three_names(model, single, tmp_path):
    """Each with what stands in front of it, or without where it is the only one; in a file as in a folder."""
    model.save(tmp_path / "folder")
    for path in (single, tmp_path / "folder"):
        weights = minisd.checkpoint.open(path)
        for component, keys in model_keys(model.config).items():
            for key in keys:
                one = weights[f"{component}.{key.minisd}"]
                names = [
                    f"{component}/{key.diffusers}",
                    f"{component}.{key.diffusers}",
                    COMPVIS_PREFIX[component] + key.compvis,
                ]
                assert all(weights[name] is one for name in (*names, key.minisd, key.diffusers, key.compvis))
        assert set(weights) == set(model.state()) and len(weights) == len(model.state())


def test_no_name_means_two_weights_of_sd15():
    """Which is why names are taken without their component."""
    meant: dict[str, set[str]] = {}
    for component, keys in model_keys(SD15).items():
        for key in keys:
            for name in (key.minisd, key.diffusers, key.compvis):
                meant.setdefault(name, set()).add(f"{component}.{key.minisd}")
    assert [names for names in meant.values() if len(names) > 1] == []


def test_shapes_and_dtypes_come_from_the_header(model, single, monkeypatch):
    monkeypatch.setattr("minisd.checkpoint.values.memory_mapped", lambda path: pytest.fail("a value was read"))
    for name, weight in minisd.checkpoint.open(single).items():
        assert (weight.shape, weight.dtype) == (model.state()[name].shape, torch.float32)


def test_slices_and_whole_values(model, single):
    weight, expected = minisd.checkpoint.open(single)[NAME], model.state()[NAME]
    assert torch.equal(weight.read(), expected)
    for index in (3, slice(2, 7), (slice(None), 5), (slice(0, 8, 2), slice(4)), ..., [1, 4]):
        assert torch.equal(weight[index], expected[index])


def test_a_vae_matrix_has_the_models_shape(single):
    weight = minisd.checkpoint.open(single)["vae.decoder.middle.1.attn.q.weight"]
    assert weight.shape == (32, 32) and weight.read().shape == (32, 32)
    assert load_file(single)[weight.compvis].shape == (32, 32, 1, 1)


def test_it_is_read_only(single):
    before = single.read_bytes()
    weights = minisd.checkpoint.open(single)
    weights[NAME].read().zero_()
    assert single.read_bytes() == before and weights[NAME].read().any()
    with pytest.raises(TypeError):
        weights[NAME] = torch.zeros(1)


def test_what_is_not_there(single, tmp_path):
    weights = minisd.checkpoint.open(single)
    assert "unet.head.weight" not in weights and NAME in weights
    with pytest.raises(KeyError, match=r"unet.head.weight: no weight is called so"):
        weights["unet.head.weight"]
    vae = {name: tensor for name, tensor in load_file(single).items() if name.startswith("first_stage_model")}
    save_file(vae, tmp_path / "vae.safetensors")
    assert {name.split(".")[0] for name in minisd.checkpoint.open(tmp_path / "vae.safetensors")} == {"vae"}
    with pytest.raises(CheckpointError, match="has no ema UNet weights"):
        minisd.checkpoint.open(single, weights="ema")
    with pytest.raises(ValueError, match="must be 'auto', 'ema' or 'raw'"):
        minisd.checkpoint.open(single, weights="best")


def test_state_is_the_models_own_memory(single):
    """Writing into it changes the model, and neither the file nor a second model of the same file."""
    before = single.read_bytes()
    one, other = StableDiffusion.load(single), StableDiffusion.load(single)
    state = one.state()
    state[NAME][:8] = 0
    assert not one.unet.down[4].attention.cross_attn.q.weight[:8].any()
    assert other.state()[NAME][:8].all() and single.read_bytes() == before
