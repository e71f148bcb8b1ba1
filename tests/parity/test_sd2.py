"""Stable Diffusion 2.x: heads of 64 channels, linear projections, OpenCLIP's text encoder, v-prediction."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer as ReferenceTokenizer

import minisd
from minisd import SD15
from minisd.checkpoint.survey import survey
from minisd.checkpoint.tokenizer_files import write_folder
from minisd.tokenizer import CLIPTokenizer
from tests.parity.reference import reference_text_encoder, reference_unet, reference_vae, write_lora_by_hand

CROSS = "middle.0.attention.cross_attn"
PREFIX = "cond_stage_model.model."


@pytest.fixture(scope="module")
def twin2(tmp_path_factory):
    """diffusers' pipeline of SD 2.1's plan, narrow, and its folder."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("sd2")
    write_folder(CLIPTokenizer.clip("!"), root / "words")
    pipeline = StableDiffusionPipeline(
        unet=reference_unet(
            (64, 128, 192, 256), 128, attention_head_dim=[1, 2, 3, 4], use_linear_projection=True, upcast_attention=True
        ),
        vae=reference_vae((32, 32, 64, 64)),
        text_encoder=reference_text_encoder(128, hidden_act="gelu", num_hidden_layers=23, pad_token_id=0),
        tokenizer=ReferenceTokenizer.from_pretrained(root / "words"),
        scheduler=DDIMScheduler.from_config({**SD15.scheduler, "prediction_type": "v_prediction"}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(root / "model")
    return pipeline, root / "model"


@pytest.fixture(scope="module")
def single(twin2, tmp_path_factory):
    """The same as one file, under the names of SD 2.x's files, without any metadata: CompVis' and OpenCLIP's."""
    path = tmp_path_factory.mktemp("single") / "sd2.safetensors"
    minisd.StableDiffusion.load(twin2[1]).save(path, layout="compvis")
    tensors = load_file(path)
    for end in ("ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "mlp.c_fc.bias"):  # the layer that nobody uses
        tensors[f"{PREFIX}transformer.resblocks.23.{end}"] = tensors[f"{PREFIX}transformer.resblocks.22.{end}"].clone()
    tensors[f"{PREFIX}text_projection"], tensors[f"{PREFIX}logit_scale"] = torch.zeros(128, 128), torch.zeros(())
    save_file(tensors, path)
    return path


def picture_of(sd, **settings):
    return np.asarray(sd.text_to_image("a red heart", steps=4, seed=3, **settings)[0])


def test_folder(twin2):
    pipeline, folder = twin2
    sd = minisd.StableDiffusion.load(folder)
    generator = torch.Generator().manual_seed(3)
    theirs = pipeline("a red heart", num_inference_steps=4, generator=generator).images[0]
    assert np.array_equal(picture_of(sd), np.asarray(theirs))
    assert torch.equal(
        sd.tokenizer(["a red heart"]),
        pipeline.tokenizer(["a red heart"], padding="max_length", return_tensors="pt").input_ids,
    )
    assert sd.tokenizer("")[0, -1] == 0  # "!"


def test_single_file(twin2, single):
    """Recognised and understood from its shapes: v-prediction at 768 pixels, said in a note."""
    found = survey(single)
    assert found.problem() is None and found.schedule.prediction == "v_prediction"
    assert any("v_prediction as usual for SD 2.x" in note for note in found.notes)
    assert found.parts["unet"].config.sample_size == 96 and found.parts["unet"].config.heads == (1, 2, 3, 4)
    sd, folder = minisd.StableDiffusion.load(single), minisd.StableDiffusion.load(twin2[1])
    assert sd.text_encoder.config == folder.text_encoder.config and sd.tokenizer.pad_token == "!"
    assert all(torch.equal(sd.state()[name], weight) for name, weight in folder.state().items())
    assert np.array_equal(picture_of(sd, height=64, width=64), picture_of(folder))


def test_openclip_names(twin2, single):
    """diffusers' own conversion of OpenCLIP's names gives the weights back."""
    from transformers import CLIPTextModel

    encoder = twin2[0].text_encoder
    # diffusers takes the width from the projection, and asks for the last layer too
    theirs = convert_open_clip_checkpoint(CLIPTextModel(encoder.config), load_file(single), prefix=PREFIX)
    mine = {name.removeprefix("text_model."): weight for name, weight in encoder.state_dict().items()}
    theirs = {name.removeprefix("text_model."): weight for name, weight in theirs.items()}
    assert len(mine) == 2 + 23 * 16 + 2
    assert all(torch.equal(theirs[name], weight) for name, weight in mine.items() if "position_ids" not in name)


def test_inspected_by_its_name(single):
    """24 fused layers count as the tensors that they are; the leftovers have a class each."""
    from minisd.lab.weights.inspect import inspect

    report = inspect(single)
    assert report.what == "Stable Diffusion 2.x" and report.problem is None
    assert report.tensors == len(load_file(single))


def test_conversion_both_ways(twin2, single, tmp_path):
    """One file -> a folder -> one file: every tensor that is used comes back, the thirds of a tensor in their order."""
    from minisd.lab.weights.convert import convert

    convert(single, tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    convert(single, tmp_path / "half.safetensors", dtype=torch.float16)
    before, after = load_file(single), load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(before[name], weight) for name, weight in after.items())
    assert after[f"{PREFIX}transformer.resblocks.0.attn.in_proj_weight"].shape == (384, 128)
    assert set(load_file(tmp_path / "half.safetensors")) == set(before)


def test_lora(twin2, tmp_path):
    """A LoRA for linear projections and wide text, under kohya's names, as weights that were changed by hand."""
    names = {
        "lora_unet_down_blocks_1_attentions_0_proj_in": "unet.down.3.attention.proj_in.weight",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": f"unet.{CROSS}.k.weight",
        "lora_te_text_model_encoder_layers_22_self_attn_v_proj": "text_encoder.layers.22.self_attn.v.weight",
    }
    sd, changed = (minisd.StableDiffusion.load(twin2[1]) for _ in range(2))
    write_lora_by_hand(names, changed, tmp_path / "lora.safetensors")
    plain = picture_of(sd)
    sd.load_lora(tmp_path / "lora.safetensors")
    assert not np.array_equal(picture_of(sd), plain)
    assert np.abs(picture_of(sd).astype(int) - picture_of(changed)).max() <= 1


def test_dialect(twin2):
    """diffusers' own program on a folder of SD 2.x."""
    from minisd.diffusers import StableDiffusionPipeline as Dialect

    pipeline, folder = twin2
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0}
    theirs = pipeline("a cat", generator=torch.Generator().manual_seed(1), **settings).images[0]
    mine = Dialect.from_pretrained(folder)("a cat", generator=torch.Generator().manual_seed(1), **settings).images[0]
    assert np.array_equal(np.asarray(mine), np.asarray(theirs))
