"""SD 1.5's real shapes, once: random weights written by diffusers and in CompVis' layout, loaded here, bit for bit.

Takes 9 GB of disk, 10 GB of memory and a few minutes.
"""

import gc
import gzip
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minisd
from minisd.checkpoint.tokenizer_files import write_folder
from minisd.tokenizer import CLIPTokenizer
from tests.parity.reference import FULL, reference_text_encoder, reference_unet, reference_vae

GIGABYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else 0
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(GIGABYTES < 12 and not os.environ.get("CI"), reason="needs 12 GB of memory"),
]

NAMES = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "sd15_names.json.gz").read_bytes()))
BUILDERS = {
    "unet": lambda: reference_unet(FULL["unet"], FULL["text"]),
    "vae": lambda: reference_vae(FULL["vae"]),
    "text_encoder": lambda: reference_text_encoder(FULL["text"]),
}
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SD 1.5 with random weights, written by diffusers and transformers, one component at a time."""
    folder = tmp_path_factory.mktemp("sd15")
    torch.manual_seed(0)
    for component, build in BUILDERS.items():
        build().save_pretrained(folder / component, max_shard_size="20GB")
        gc.collect()
    write_folder(CLIPTokenizer.clip(), folder / "tokenizer")
    yield folder
    for component, file in FILES.items():  # the temporary folders of three runs would be 25 GB
        (folder / component / file).unlink()


@pytest.fixture(scope="module")
def ours(folder):
    return minisd.StableDiffusion.load(folder)


def test_the_inferred_configuration_is_sd15(ours):
    assert ours.config == minisd.SD15


@torch.no_grad()
def test_unet(folder, ours):
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel.from_pretrained(folder / "unet")
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(1, 77, 768, generator=generator)
    for scale, t in ((1.0, 981), (0.01, 1)):
        latents = torch.randn(1, 4, 64, 64, generator=generator) * scale
        reference = theirs(latents, t, encoder_hidden_states=context).sample
        assert torch.equal(ours.unet(latents, torch.tensor(t), context), reference)


@torch.no_grad()
def test_vae(folder, ours):
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL.from_pretrained(folder / "vae")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, 512, 512, generator=generator).clamp(-1, 1)
    reference = theirs.encode(images).latent_dist
    assert torch.equal(ours.vae.encode(images).mean, reference.mean)
    assert torch.equal(ours.vae.decode(reference.mean), theirs.decode(reference.mean).sample)


@torch.no_grad()
def test_text_encoder(folder, ours):
    from transformers import CLIPTextModel

    theirs = CLIPTextModel.from_pretrained(folder / "text_encoder")
    ids = ours.tokenizer(["a photograph of an astronaut riding a horse", ""])
    assert torch.equal(ours.text_encoder(ids), theirs(ids)[0])


def test_compvis_single_file(folder, ours, tmp_path):
    """The same weights in CompVis' layout, with the names that were pinned from original files, and its leftovers."""
    path = tmp_path / "sd15.safetensors"
    tensors = {
        "alphas_cumprod": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    for component, file in FILES.items():
        state = load_file(folder / component / file)
        bare = "text_model.embeddings.token_embedding.weight" not in state and component == "text_encoder"
        for name, compvis in NAMES["diffusers_to_compvis"][component].items():
            tensor = state[name.removeprefix("text_model.") if bare else name]
            convolution = name in NAMES["one_by_one_conv_in_compvis"]
            tensors[compvis] = tensor[:, :, None, None] if convolution else tensor
    assert len(tensors) == 1130 + 3
    save_file(tensors, path)
    del tensors
    single = minisd.StableDiffusion.load(path)
    assert single.config == ours.config
    for component in FILES:
        one, other = getattr(ours, component).state_dict(), getattr(single, component).state_dict()
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    path.unlink()
