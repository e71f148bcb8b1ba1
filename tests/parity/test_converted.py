"""What `minisd convert` writes, diffusers loads: folder and single file, every weight as in the source."""

import diffusers
import pytest
import torch

from minisd.checkpoint.hub import embedded_model
from minisd.lab.weights.convert import convert


def weights(pipe):
    """Under the names that the running transformers gives, with or without `text_model.`."""
    return {
        f"{part}.{name.removeprefix('text_model.')}": tensor
        for part in ("unet", "vae", "text_encoder")
        for name, tensor in getattr(pipe, part).state_dict().items()
        if not name.endswith("position_ids")
    }


@pytest.fixture(scope="module")
def source():
    return weights(diffusers.StableDiffusionPipeline.from_pretrained(embedded_model(), safety_checker=None))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_single_file_and_folder(source, tmp_path):
    """There: CompVis' layout with the text encoder's canonical prefix. And back from it."""
    single = convert("emoji", tmp_path / "single.safetensors")
    load = diffusers.StableDiffusionPipeline.from_single_file
    pipe = load(str(single), config=str(embedded_model()), local_files_only=True, safety_checker=None)
    assert same(weights(pipe), source)
    folder = convert(single, tmp_path / "folder", shard_size=3_000_000)
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 5
    assert same(weights(diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)), source)
