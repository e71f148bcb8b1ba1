"""SDXL: two text encoders, a pooled vector and six numbers beside the text, transformers of several layers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers import CLIPTokenizer as ReferenceTokenizer

import minisd
import minisd.diffusers as dialect
from minisd import SD15
from minisd.checkpoint.hub import wanted_files
from minisd.checkpoint.tokenizer_files import write_folder
from minisd.lab.weights.convert import convert
from minisd.lab.weights.inspect import inspect
from minisd.pipeline import to_pictures
from minisd.tasks import compose, finish, image_to_image, invert, mean_latents, reconstruct, to_images
from minisd.tokenizer import CLIPTokenizer
from minisd.xl import refine
from tests.parity.reference import reference_text_encoder, reference_unet, reference_vae, shake, write_lora_by_hand

POOLED, NUMBERS = 192, 256  # OpenCLIP's projection is square
SECOND = "conditioner.embedders.1.model"
DEEP = "unet.down.4.attention.more.0"


def second_encoder():
    settings = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=3,
        hidden_act="gelu",
        projection_dim=POOLED,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=0,
    )
    return shake(CLIPTextModelWithProjection(settings))


@pytest.fixture(scope="module")
def twin_xl(tmp_path_factory):
    """diffusers' pipeline of SDXL's plan, narrow, and its folder."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("xl")
    write_folder(CLIPTokenizer.clip(), root / "words")
    write_folder(CLIPTokenizer.clip("!"), root / "words2")
    pipeline = StableDiffusionXLPipeline(
        unet=reference_unet(
            (64, 128, 192),
            128 + 192,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=[1, 2, 3],
            transformer_layers_per_block=[1, 2, 3],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=NUMBERS,
            projection_class_embeddings_input_dim=POOLED + 6 * NUMBERS,
        ),
        vae=reference_vae((32, 32, 64, 64), scaling_factor=0.13025),
        text_encoder=reference_text_encoder(128),
        text_encoder_2=second_encoder(),
        tokenizer=ReferenceTokenizer.from_pretrained(root / "words"),
        tokenizer_2=ReferenceTokenizer.from_pretrained(root / "words2"),
        scheduler=DDIMScheduler.from_config(dict(SD15.scheduler)),
        add_watermarker=False,
    )
    pipeline.save_pretrained(root / "model")
    # Loaded again: kernels may choose by how weights are aligned in memory, and both sides shall have them alike.
    return loaded(root / "model"), root / "model"


def loaded(folder, kind=StableDiffusionXLPipeline):
    pipeline = kind.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline, prompt="a red heart", **settings):
    settings = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(3), **settings}
    return np.asarray(pipeline(prompt, **settings).images[0])


def mine(sd, prompt="a red heart", **settings):
    return np.asarray(sd.text_to_image(prompt, **{"steps": 3, "seed": 3, "guidance_scale": 5.0, **settings})[0])


def test_folder(twin_xl):
    pipeline, folder = twin_xl
    sd = minisd.StableDiffusion.load(folder)
    assert np.array_equal(mine(sd), theirs(pipeline))
    assert np.array_equal(mine(sd, guidance_scale=1.0), theirs(pipeline, guidance_scale=1.0))


@pytest.mark.parametrize(
    ("ours", "others"),
    [
        ({"negative_prompt": "a blue circle"}, {"negative_prompt": "a blue circle"}),
        ({"original_size": (32, 48)}, {"original_size": (32, 48)}),
        ({"crop": (8, 16)}, {"crops_coords_top_left": (8, 16)}),
        ({"target_size": (16, 24)}, {"target_size": (16, 24)}),
        ({"height": 64, "width": 96}, {"height": 64, "width": 96}),
        ({"clip_skip": 1}, {"clip_skip": 1}),
    ],
)
def test_conditions(twin_xl, ours, others):
    """Each changes the picture, as it does in diffusers."""
    pipeline, folder = twin_xl
    sd = minisd.StableDiffusion.load(folder)
    changed = mine(sd, **ours)
    assert np.array_equal(changed, theirs(pipeline, **others))
    assert changed.shape != mine(sd).shape or not np.array_equal(changed, mine(sd))


def test_saved_as_a_folder_and_a_file(twin_xl, tmp_path):
    pipeline, folder = twin_xl
    sd = minisd.StableDiffusion.load(folder)
    sd.save(tmp_path / "model")
    assert np.array_equal(theirs(loaded(tmp_path / "model")), theirs(pipeline))
    sd.save(tmp_path / "xl.safetensors", layout="compvis")
    single = minisd.StableDiffusion.load(tmp_path / "xl.safetensors")
    assert single.config == sd.config
    assert all(torch.equal(single.state()[name], weight) for name, weight in sd.state().items())


@pytest.fixture(scope="module")
def single(twin_xl, tmp_path_factory):
    """The same as one file without any metadata, as published: widths, depths and heads show in shapes."""
    path = tmp_path_factory.mktemp("single") / "xl.safetensors"
    minisd.StableDiffusion.load(twin_xl[1]).save(path, layout="compvis")
    save_file(load_file(path), path)
    return path


def test_published_names(twin_xl, single):
    """diffusers' own conversion of OpenCLIP's names gives the second encoder's weights back, the projection turned."""
    theirs = convert_open_clip_checkpoint(
        CLIPTextModelWithProjection(twin_xl[0].text_encoder_2.config), load_file(single), prefix=f"{SECOND}."
    )
    mine = twin_xl[0].text_encoder_2.state_dict()
    assert {name for name in mine if "position_ids" not in name} == {n for n in theirs if "position_ids" not in n}
    assert all(torch.equal(theirs[name], weight) for name, weight in mine.items() if "position_ids" not in name)
    names = load_file(single).keys()
    assert "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight" in names
    assert "model.diffusion_model.input_blocks.5.1.transformer_blocks.1.attn2.to_k.weight" in names
    assert "model.diffusion_model.label_emb.0.2.bias" in names


def test_understood_by_shapes_alone(twin_xl, single):
    report, sd = inspect(single), minisd.StableDiffusion.load(twin_xl[1])
    assert report.what == "Stable Diffusion XL" and report.tensors == len(load_file(single))
    unet = report.parts["unet"].config
    assert (unet.depths, unet.heads, unet.added_width) == ((1, 2, 3), (1, 2, 3), sd.unet.config.added_width)
    assert report.parts["vae"].config.scaling_factor == 0.13025
    assert report.parts["text_encoder_2"].config == sd.text_encoder_2.config


def test_conversion_both_ways(twin_xl, single, tmp_path):
    convert(single, tmp_path / "half.safetensors", dtype=torch.float16)
    convert(twin_xl[1], tmp_path / "file.safetensors")
    convert(tmp_path / "file.safetensors", tmp_path / "folder")
    paths = single, tmp_path / "file.safetensors", tmp_path / "half.safetensors"
    before, after, half = map(load_file, paths)
    assert before.keys() == after.keys() == half.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert all(torch.equal(half[name], weight.half()) for name, weight in before.items())
    assert np.array_equal(theirs(loaded(tmp_path / "folder")), theirs(twin_xl[0]))


def test_parts_that_do_not_fit(twin_xl, single, tmp_path):
    tensors = load_file(single)
    save_file({name: one for name, one in tensors.items() if SECOND not in name}, tmp_path / "one.safetensors")
    with pytest.raises(minisd.CheckpointError, match="the UNet expects text of width 320, the text encoder gives 128"):
        minisd.StableDiffusion.load(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"crop=\(1,\): must be two whole numbers"):
        minisd.StableDiffusion.load(twin_xl[1]).denoise("a cat", crop=(1,))


def test_lora(twin_xl, tmp_path):
    """kohya's names for SDXL: the UNet's blocks as in single files, te1 and te2; as weights changed by hand."""
    names = {
        "lora_unet_input_blocks_5_1_transformer_blocks_1_ff_net_2": f"{DEEP}.feed_forward.contract.weight",
        "lora_unet_middle_block_1_proj_in": "unet.middle.0.attention.proj_in.weight",
        "lora_te1_text_model_encoder_layers_3_mlp_fc1": "text_encoder.layers.3.feed_forward.expand.weight",
        "lora_te2_text_model_encoder_layers_4_self_attn_v_proj": "text_encoder_2.layers.4.self_attn.v.weight",
    }
    sd, changed = (minisd.StableDiffusion.load(twin_xl[1]) for _ in range(2))
    write_lora_by_hand(names, changed, tmp_path / "lora.safetensors")
    plain = mine(sd)
    sd.load_lora(tmp_path / "lora.safetensors")
    assert not np.array_equal(mine(sd), plain)
    assert np.abs(mine(sd).astype(int) - mine(changed)).max() <= 1
    sd.unload_lora()
    assert np.array_equal(mine(sd), plain)


def test_pictures_remember_their_sizes(twin_xl):
    picture = minisd.StableDiffusion.load(twin_xl[1]).text_to_image("a cat", steps=1, seed=1, crop=(8, 16))[0]
    assert json.loads(picture.info["minisd"])["options"]["crop"] == [8, 16]


def test_vae_stays_in_float32(twin_xl):
    """In float16 SDXL's VAE overflows: only the other parts are loaded in it. Pictures go in and out all the same."""
    sd = minisd.StableDiffusion.load(twin_xl[1], dtype=torch.float16)
    assert {name: next(part.parameters()).dtype for name, part in sd.modules.items()} == {
        "text_encoder": torch.float16,
        "text_encoder_2": torch.float16,
        "unet": torch.float16,
        "vae": torch.float32,
    }
    assert sd.decode(torch.zeros(1, 4, 8, 8, dtype=torch.float16)).dtype == torch.float32
    assert mean_latents(sd, torch.zeros(1, 3, 64, 64)).dtype == torch.float16
    assert minisd.StableDiffusion.load(twin_xl[1], dtype=torch.bfloat16).vae.quant_conv.weight.dtype == torch.bfloat16


def test_dialect(twin_xl, tmp_path):
    """diffusers' own program on the folder and on the file, with its own arguments, and saved again."""
    pipeline, folder = twin_xl
    own = dialect.StableDiffusionXLPipeline.from_pretrained(folder)
    cases = (
        {},
        {"guidance_scale": 1.0},
        {"negative_prompt": "", "guidance_rescale": 0.5},
        {
            "prompt_2": "a blue circle",
            "negative_prompt": "red",
            "negative_prompt_2": "round",
            "num_images_per_prompt": 2,
        },
        {"original_size": (32, 32), "crops_coords_top_left": (4, 8), "target_size": (64, 64), "clip_skip": 1},
        {"negative_original_size": (16, 16), "negative_target_size": (64, 64), "denoising_end": 0.6},
        {"output_type": "latent", "height": 72, "width": 64},
    )
    for case in cases:
        assert np.array_equal(theirs(own, **case), theirs(pipeline, **case)), case
    own.save_pretrained(tmp_path / "model")
    assert np.array_equal(theirs(loaded(tmp_path / "model")), theirs(pipeline))
    assert type(dialect.DiffusionPipeline.from_pretrained(tmp_path / "model")) is dialect.StableDiffusionXLPipeline
    with pytest.raises(dialect.NotCoveredError, match="use StableDiffusionXLPipeline"):
        dialect.StableDiffusionPipeline.from_pretrained(folder)


def test_dialect_from_images(twin_xl):
    own = dialect.StableDiffusionXLImg2ImgPipeline.from_pretrained(twin_xl[1])
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pipe(twin_xl[0])
    pipeline.set_progress_bar_config(disable=True)
    for case in (
        {"strength": 0.8},
        {"negative_prompt": "red", "original_size": (32, 32), "crops_coords_top_left": (4, 8), "strength": 1.0},
        {"num_inference_steps": 10, "denoising_end": 0.8, "output_type": "latent", "num_images_per_prompt": 2},
    ):
        settings = {"image": picture(), "num_inference_steps": 4, **case}
        assert np.array_equal(theirs(own, **settings), theirs(pipeline, **settings)), case


def test_dialect_inpainting(twin_xl):
    own = dialect.StableDiffusionXLInpaintPipeline.from_pretrained(twin_xl[1])
    pipeline = StableDiffusionXLInpaintPipeline.from_pipe(twin_xl[0])
    pipeline.set_progress_bar_config(disable=True)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    for case in ({}, {"strength": 1.0, "crops_coords_top_left": (4, 8), "guidance_rescale": 0.3}, {"strength": 0.5}):
        settings = {"image": picture(), "mask_image": mask, "num_inference_steps": 4, **case}
        assert np.array_equal(theirs(own, **settings), theirs(pipeline, **settings)), case


def test_dialect_second_encoder(twin_xl):
    """Its outputs have transformers' names, and the UNet says what it takes."""
    pipeline, folder = twin_xl
    own = dialect.CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder_2")
    ids = pipeline.tokenizer_2(["a cat"], padding="max_length", return_tensors="pt").input_ids
    mine, others = own(ids, output_hidden_states=True), pipeline.text_encoder_2(ids, output_hidden_states=True)
    assert torch.equal(mine.text_embeds, others.text_embeds) and torch.equal(mine[0], others[0])
    assert all(torch.equal(*both) for both in zip(mine.hidden_states, others.hidden_states, strict=True))
    unet = dialect.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    with pytest.raises(ValueError, match=r"has \[\], and takes \['text_embeds', 'time_ids'\]"):
        unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 320))


def picture() -> Image.Image:
    return Image.fromarray(np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8))


def test_image_to_image(twin_xl):
    """The tasks need not know of it: what the UNet is told travels in the context."""
    sd, pipeline = minisd.StableDiffusion.load(twin_xl[1]), StableDiffusionXLImg2ImgPipeline.from_pipe(twin_xl[0])
    pipeline.set_progress_bar_config(disable=True)
    settings = {"strength": 0.6, "guidance_scale": 5.0}
    steps = image_to_image(sd, "a red heart", picture(), steps=5, seed=3, **settings)
    others = theirs(pipeline, image=picture(), num_inference_steps=5, **settings)
    assert np.array_equal(np.asarray(finish(sd, steps)[0]), others)


def test_other_tasks(twin_xl):
    """Inversion comes back, composed prompts and long ones run, and sizes change what they give."""
    sd = minisd.StableDiffusion.load(twin_xl[1])
    latents = mean_latents(sd, to_images([picture()], 64, 64))
    steps = list(invert(sd, "a cat", latents, steps=4, guidance_scale=2.0))
    *_, last = reconstruct(sd, "a cat", steps, steps=4, guidance_scale=2.0)
    assert torch.allclose(last.latents, latents, atol=1e-3)
    both = compose(sd, [("a dog", 0.5)], 0.5)
    assert not np.array_equal(mine(sd, predict_noise=both), mine(sd))
    long = "a cat and " * 60
    assert sd.encode_prompt(long, None, long_prompts=True).shape[1] == 3 * 77 + 6
    assert not np.array_equal(mine(sd, long, long_prompts=True), mine(sd, long, long_prompts=True, crop=(32, 0)))


def test_textual_inversion(twin_xl, tmp_path):
    """A file for both text encoders, of two vectors, as diffusers is given its halves."""
    vectors = {"clip_l": torch.randn(2, 128) * 0.05, "clip_g": torch.randn(2, 192) * 0.05}
    save_file(vectors, tmp_path / "<thing>.safetensors")
    pipeline, sd = loaded(twin_xl[1]), minisd.StableDiffusion.load(twin_xl[1])
    plain = mine(sd, "a <thing> in red")
    assert sd.load_embedding(tmp_path / "<thing>.safetensors") == ["<thing>"]
    encoders = {"clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2}
    tokenizers = {"clip_l": pipeline.tokenizer, "clip_g": pipeline.tokenizer_2}
    for name, half in vectors.items():
        where = {"text_encoder": encoders[name], "tokenizer": tokenizers[name]}
        pipeline.load_textual_inversion(half, token="<thing>", **where)
    changed = mine(sd, "a <thing> in red")
    assert np.array_equal(changed, theirs(pipeline, "a <thing> in red")) and not np.array_equal(changed, plain)
    sd.unload_embedding()
    assert np.array_equal(mine(sd, "a <thing> in red"), plain)
    save_file({"emb_params": torch.zeros(1, 128)}, tmp_path / "one.safetensors")
    with pytest.raises(minisd.CheckpointError, match=r"has no clip_l: SDXL has two text encoders"):
        sd.load_embedding(tmp_path / "one.safetensors")


@pytest.fixture(scope="module")
def refiner(twin_xl, tmp_path_factory):
    """diffusers' pipeline of the refiner's plan, narrow, and its folder: the second text encoder alone, and a score."""
    root = tmp_path_factory.mktemp("refiner")
    torch.manual_seed(1)
    pipeline = StableDiffusionXLImg2ImgPipeline(
        unet=reference_unet(
            (64, 128, 192, 192),
            192,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=[1, 2, 3, 3],
            transformer_layers_per_block=2,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=NUMBERS,
            projection_class_embeddings_input_dim=POOLED + 5 * NUMBERS,
        ),
        vae=twin_xl[0].vae,
        text_encoder=None,
        text_encoder_2=twin_xl[0].text_encoder_2,
        tokenizer=None,
        tokenizer_2=twin_xl[0].tokenizer_2,
        scheduler=twin_xl[0].scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.save_pretrained(root / "model")
    return loaded(root / "model", StableDiffusionXLImg2ImgPipeline), root / "model"


def test_refiner_alone(refiner, tmp_path):
    pipeline, folder = refiner
    sd, settings = minisd.StableDiffusion.load(folder), {"strength": 0.6, "guidance_scale": 5.0}
    corner = {"crops_coords_top_left": (4, 8), "negative_crops_coords_top_left": (4, 8)}
    for ours, others in (
        ({}, {}),
        ({"negative_prompt": "red", "aesthetic_score": 9.0}, {"negative_prompt": "red", "aesthetic_score": 9.0}),
        ({"negative_aesthetic_score": 1.0, "crop": (4, 8)}, {"negative_aesthetic_score": 1.0, **corner}),
    ):
        steps = image_to_image(sd, "a cat", picture(), steps=5, seed=3, **settings, **ours)
        wanted = theirs(pipeline, "a cat", image=picture(), num_inference_steps=5, **settings, **others)
        assert np.array_equal(np.asarray(finish(sd, steps)[0]), wanted), ours


def test_refiner_in_files(refiner, tmp_path):
    pipeline, folder = refiner
    sd, case = minisd.StableDiffusion.load(folder), {"image": picture(), "strength": 0.9}
    sd.save(tmp_path / "model")
    assert np.array_equal(
        theirs(loaded(tmp_path / "model", StableDiffusionXLImg2ImgPipeline), **case), theirs(pipeline, **case)
    )
    sd.save(tmp_path / "file.safetensors", layout="compvis")
    save_file(load_file(tmp_path / "file.safetensors"), tmp_path / "published.safetensors")
    assert "conditioner.embedders.0.model.text_projection" in load_file(tmp_path / "published.safetensors")
    single = minisd.StableDiffusion.load(tmp_path / "published.safetensors")
    assert single.unet.config == replace(sd.unet.config, sample_size=128) and single.tokenizer.pad_token == "!"
    assert all(torch.equal(single.state()[name], weight) for name, weight in sd.state().items())
    assert inspect(tmp_path / "published.safetensors").what == "Stable Diffusion XL, refiner"
    convert(tmp_path / "published.safetensors", tmp_path / "folder")
    again = loaded(tmp_path / "folder", StableDiffusionXLImg2ImgPipeline)
    for part in ("unet", "vae", "text_encoder_2"):
        weights, before = getattr(again, part).state_dict(), getattr(pipeline, part).state_dict()
        assert weights.keys() == before.keys() and all(torch.equal(weights[name], before[name]) for name in before)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    fetched = wanted_files("somebody/refiner", names, half=False, weights="auto")
    assert {"text_encoder_2/model.safetensors", "tokenizer_2/tokenizer_config.json"} <= set(fetched)


def test_base_and_refiner(twin_xl, refiner):
    """The first part of the timesteps by one, the rest by the other, as diffusers' two pipelines hand over."""
    base, fine = minisd.StableDiffusion.load(twin_xl[1]), minisd.StableDiffusion.load(refiner[1])
    *_, last = refine(base, fine, "a cat", 0.7, steps=6, seed=3, guidance_scale=5.0)
    settings = {"num_inference_steps": 6, "guidance_scale": 5.0}
    generator = torch.Generator().manual_seed(3)
    half = twin_xl[0]("a cat", denoising_end=0.7, output_type="latent", generator=generator, **settings).images
    images = refiner[0]("a cat", image=half, denoising_start=0.7, generator=generator, **settings).images
    assert np.array_equal(np.asarray(to_pictures(fine.decode(last.latents))[0]), np.asarray(images[0]))
    with pytest.raises(ValueError, match="share=1: leaves 6 of 6 steps to the base model"):
        refine(base, fine, "a cat", 1, steps=6)
