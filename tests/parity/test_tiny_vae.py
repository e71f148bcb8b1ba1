"""TAESD: diffusers' AutoencoderTiny, and the original files."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import minisd
from minisd.tasks import finish, image_to_image
from tests.parity.reference import shake


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    reference = shake(AutoencoderTiny())
    folder = tmp_path_factory.mktemp("taesd")
    reference.save_pretrained(folder / "diffusers")
    halves = {"encoder": {}, "decoder": {}}
    for name, tensor in reference.state_dict().items():
        half, _, number, rest = name.split(".", 3)
        halves[half][f"{int(number) + (half == 'decoder')}.{rest}"] = tensor.clone()
    for half, tensors in halves.items():
        save_file(tensors, folder / f"taesd_{half}.safetensors")
    both = {f"taesd_{half}.{name}": tensor for half, tensors in halves.items() for name, tensor in tensors.items()}
    save_file(both, folder / "both.safetensors")
    return reference, folder


SOURCES = (
    "diffusers",
    "diffusers/diffusion_pytorch_model.safetensors",
    "taesd_decoder.safetensors",
    "both.safetensors",
)


@pytest.mark.parametrize("source", SOURCES)
def test_both_ways(tiny, twin, source):
    reference, folder = tiny
    vae = minisd.StableDiffusion.load(twin[1], vae=folder / source).vae
    images, latents = torch.rand(2, 3, 64, 48) * 2 - 1, 2 * torch.randn(2, 4, 8, 6)
    with torch.no_grad():
        assert torch.equal(vae.encode(images).sample(), reference.encode(images).latents)
        assert torch.equal(vae.decode(latents), reference.decode(latents).sample)


def test_pictures(tiny, twin):
    """Text and pictures to pictures, with a LoRA's place and the saved settings untouched."""
    reference, folder = tiny
    sd = minisd.StableDiffusion.load(twin[1], vae=folder / "taesd_encoder.safetensors")
    pipeline = StableDiffusionPipeline(**(twin[0].components | {"vae": reference}), requires_safety_checker=False)
    theirs = pipeline("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(1), height=64, width=64)
    mine = sd.text_to_image("a cat", steps=3, seed=1, height=64, width=64)
    assert np.array_equal(np.asarray(mine[0]), np.asarray(theirs.images[0]))
    assert finish(sd, image_to_image(sd, "a cat", mine, steps=3, strength=0.7, seed=1))
    with pytest.raises(ValueError, match=r"TAESD .* cannot be saved"):
        sd.save(folder / "model")


def test_half_and_wrong_ones(tiny, twin, tmp_path):
    alone = tmp_path / "taesd_decoder.safetensors"
    tensors = minisd.StableDiffusion.load(twin[1], vae=tiny[1] / "both.safetensors").vae.tiny_decoder.state_dict()
    original = {f"{int(name.partition('.')[0]) + 1}.{name.partition('.')[2]}": t for name, t in tensors.items()}
    save_file(original, alone)
    sd = minisd.StableDiffusion.load(twin[1], vae=alone)
    with pytest.raises(ValueError, match="can only decode"):
        sd.vae.encode(torch.zeros(1, 3, 64, 64))
    save_file(original | {"1.weight": torch.zeros(64, 16, 3, 3)}, alone)
    with pytest.raises(minisd.CheckpointError, match=r"is not SD 1.x's TAESD: 1.weight is F32 \[64, 16, 3, 3\]"):
        minisd.StableDiffusion.load(twin[1], vae=alone)
    del original["3.conv.0.weight"]
    save_file(original, alone)
    with pytest.raises(minisd.CheckpointError, match="is a TAESD without"):
        minisd.StableDiffusion.load(twin[1], vae=alone)


def test_dialect(tiny, twin, tmp_path):
    """`pipe.vae = AutoencoderTiny.from_pretrained(...)`, as programs do; its own calls; its files."""
    from minisd import diffusers as dialect

    reference, folder = tiny
    vae = dialect.AutoencoderTiny.from_pretrained(folder / "diffusers", torch_dtype=torch.float32)
    images = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        assert torch.equal(vae(images).sample, reference(images).sample)
        assert torch.equal(vae.encode(images).latents, reference.encode(images, return_dict=False)[0])
    assert vae.state_dict().keys() == reference.state_dict().keys()
    vae.save_pretrained(tmp_path / "saved")
    again = AutoencoderTiny.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in reference.state_dict().items())

    settings = {"num_inference_steps": 4, "strength": 0.6, "image": twin_picture()}
    made = []
    for library, tiny_vae in ((diffusers, reference), (dialect, vae)):
        pipeline = library.StableDiffusionImg2ImgPipeline.from_pretrained(twin[1], safety_checker=None)
        pipeline.vae = tiny_vae
        made.append(pipeline("a cat", generator=torch.Generator().manual_seed(1), **settings).images[0])
    assert np.array_equal(*map(np.asarray, made))


def twin_picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
