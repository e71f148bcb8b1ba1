"""The key table against names and shapes that were pinned from the original projects, and against the models."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import torch

from minisd.checkpoint.keymap import COMPONENTS, COMPVIS_PREFIX, ema_name, model_keys
from minisd.config import SD15
from minisd.text_encoder import TextEncoder
from minisd.unet import UNet
from minisd.vae import VAE

REFERENCE = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "sd15_names.json.gz").read_bytes()))
COMPVIS_GROUP = {"unet": "model", "vae": "first_stage_model", "text_encoder": "cond_stage_model"}
KEYS = model_keys(SD15)


def test_counts():
    assert [len(KEYS[component]) for component in ("unet", "vae", "text_encoder")] == [686, 248, 196]


@pytest.mark.parametrize("component", COMPONENTS)
def test_diffusers_names_and_shapes(component):
    assert {key.diffusers: list(key.shape) for key in KEYS[component]} == REFERENCE["diffusers"][component]


@pytest.mark.parametrize("component", COMPONENTS)
def test_compvis_names_and_shapes(component):
    expected = dict(REFERENCE["compvis"][COMPVIS_GROUP[component]])
    expected.pop("cond_stage_model.transformer.text_model.embeddings.position_ids", None)
    ours = {COMPVIS_PREFIX[component] + key.compvis: list(key.compvis_shape) for key in KEYS[component]}
    assert ours == expected


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_two_columns_belong_together(component):
    """Against the map that diffusers' own converter makes."""
    pairs = {key.diffusers: COMPVIS_PREFIX[component] + key.compvis for key in KEYS[component]}
    assert pairs == REFERENCE["diffusers_to_compvis"][component]


def test_moving_average_names():
    assert {ema_name(key.compvis): list(key.shape) for key in KEYS["unet"]} == REFERENCE["compvis"]["ema"]


def test_eight_tensors_change_shape():
    changed = [key.diffusers for key in KEYS["vae"] if key.shape != key.compvis_shape]
    assert sorted(changed) == sorted(REFERENCE["one_by_one_conv_in_compvis"])


def test_older_names():
    """Early diffusers' names of the VAE's attention, 16 tensors."""
    older = [name for key in KEYS["vae"] for name in key.older]
    assert len(older) == 16
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in older


UNETS = {
    "SD 1.5": {},
    "inpainting": {"in_channels": 9},
    "three levels": {"widths": (32, 64, 96), "attention": (False, True, True), "resnets_per_level": 3},
    "one level": {"widths": (32,), "attention": (True,), "resnets_per_level": 1},
    "constant width": {"widths": (64, 64), "attention": (True, False)},
}
VAES = {"SD 1.5": {}, "two levels": {"widths": (32, 64), "resnets_per_level": 1}, "one level": {"widths": (32,)}}
TEXT_ENCODERS = {"SD 1.5": {}, "two layers": {"layers": 2, "width": 128, "heads": 2, "hidden_width": 100}}
CASES = [
    (component, kind, dataclasses.replace(getattr(SD15, component), **changes))
    for component, kind, variants in (
        ("unet", UNet, UNETS),
        ("vae", VAE, VAES),
        ("text_encoder", TextEncoder, TEXT_ENCODERS),
    )
    for changes in variants.values()
]


@pytest.mark.parametrize(("component", "kind", "config"), CASES)
def test_the_table_is_the_model(component, kind, config):
    """Every name and shape of the table, and no other, is in the module's state dict: for any widths and depths."""
    keys = model_keys(dataclasses.replace(SD15, **{component: config}))[component]
    with torch.device("meta"):
        state = kind(config).state_dict()
    assert {key.minisd: key.shape for key in keys} == {name: tuple(tensor.shape) for name, tensor in state.items()}
    for column in ("minisd", "diffusers", "compvis"):
        assert len({getattr(key, column) for key in keys}) == len(keys)


def test_keymap_needs_the_standard_library_only():
    import subprocess
    import sys

    code = "import minisd.checkpoint.keymap, minisd.checkpoint.naming, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
