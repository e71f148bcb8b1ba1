"""What the dialect does not cover is an error that names it, and says what is covered."""

import numpy as np
import pytest
import torch
from PIL import Image

import minisd.diffusers as dialect
from minisd.checkpoint.hub import embedded_model
from tests.ids import stable_id

FOLDER = embedded_model()
NOT_COVERED = dialect.NotCoveredError


@pytest.fixture(scope="module")
def pipe():
    pipe = dialect.StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PICTURE = Image.new("RGB", (64, 64))


@pytest.mark.parametrize(
    "settings",
    (
        {"ip_adapter_image": PICTURE},
        {"ip_adapter_image_embeds": [torch.ones(1)]},
        {"guidance_scael": 3.0},
        {"seed": 1},
    ),
    ids=lambda settings: next(iter(settings)),
)
def test_arguments_of_a_call(pipe, settings):
    (name,) = settings
    for kind in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"):
        other = getattr(dialect, kind).from_pipe(pipe)
        with pytest.raises(NOT_COVERED, match=rf"^{kind}: {name}.* minisd.diffusers, which takes "):
            other("red heart", **settings)


def test_arguments_that_another_pipeline_has(pipe):
    """diffusers takes and ignores them."""
    image = dialect.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with pytest.raises(NOT_COVERED, match="guidance_rescale"):
        image("red heart", PICTURE, guidance_rescale=0.7)
    with pytest.raises(NOT_COVERED, match="padding_mask_crop"):
        dialect.StableDiffusionInpaintPipeline.from_pipe(pipe)("x", PICTURE, PICTURE, padding_mask_crop=8)
    for name in ("timesteps", "sigmas"):  # as in diffusers
        with pytest.raises(ValueError, match=f"{name}: DDIMScheduler.set_timesteps takes none"):
            pipe("red heart", **{name: [900, 100]})
    with pytest.raises(ValueError, match="give one of the two"):
        pipe("red heart", timesteps=[1], sigmas=[1.0])


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"torch_dtype": "float16"}, "torch_dtype='float16'"),
        ({"dtype": torch.int8}, "torch_dtype=torch.int8"),
        ({"safety_checker": object()}, "safety_checker=<object"),
        ({"feature_extractor": object()}, "feature_extractor="),
        ({"image_encoder": object()}, "image_encoder="),
        ({"revision": "v2"}, "revision='v2'"),
        ({"variant": "bf16"}, "variant='bf16'"),
        ({"use_safetensors": False}, "use_safetensors=False"),
        ({"custom_pipeline": "lpw"}, "custom_pipeline"),
        ({"device_map": "auto"}, "device_map='auto'"),
        ({"quantization_config": object()}, "quantization_config"),
    ),
    ids=stable_id,
)
def test_arguments_of_loading(settings, words):
    with pytest.raises(NOT_COVERED, match=words):
        dialect.StableDiffusionPipeline.from_pretrained(FOLDER, **settings)


@pytest.mark.parametrize("name", ("UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTokenizer"))
def test_loading_a_part(name):
    folder = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}.get(name, "text_encoder")
    kind = getattr(dialect, name)
    with pytest.raises(NOT_COVERED, match=rf"{name}.from_pretrained: addapter is not covered.* subfolder"):
        kind.from_pretrained(FOLDER, subfolder=folder, addapter=1)
    with pytest.raises(NOT_COVERED, match=name):
        kind(None)


def test_networks_without_weights():
    for settings, words in (
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep' is not supported"),
        ({"layers": 3}, "UNet2DConditionModel: has no fields that nobody knows: layers"),
        ({"block_out_channels": (30, 64, 64, 64)}, "does not divide the width 30"),
    ):
        with pytest.raises(NOT_COVERED, match=words):
            dialect.UNet2DConditionModel(**settings)


def test_loading_a_scheduler():
    with pytest.raises(NOT_COVERED, match=r"DDIMScheduler\.from_pretrained: revision='v2'"):
        dialect.DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler", revision="v2")
    with pytest.raises(TypeError, match="beta_strat"):
        dialect.DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler", beta_strat=1)


def test_files_of_another_kind(tmp_path, pipe):
    with pytest.raises(NOT_COVERED, match="addresses are not covered"):
        dialect.StableDiffusionPipeline.from_single_file("https://example.org/model.safetensors")
    with pytest.raises(NOT_COVERED, match="original_config"):
        dialect.StableDiffusionPipeline.from_single_file("model.safetensors", original_config="x.yaml")
    with pytest.raises(FileNotFoundError, match="nothing here"):
        dialect.StableDiffusionPipeline.from_pretrained(tmp_path / "nothing here")
    with pytest.raises(NOT_COVERED, match="safe_serialization=False"):
        pipe.save_pretrained(tmp_path / "x", safe_serialization=False)


@pytest.mark.parametrize("name", ("load_lora_into_unet", "enable_freeu", "load_ip_adapter", "upcast_vae"))
def test_what_comes_after_a_dot(pipe, name):
    assert not hasattr(pipe, name)
    with pytest.raises(AttributeError, match=rf"StableDiffusionPipeline.{name} is not covered .* encode_prompt"):
        getattr(pipe, name)


def test_what_comes_after_the_dot_of_a_part(pipe):
    with pytest.raises(AttributeError, match=r"UNet2DConditionModel.fuse_qkv_projections is not covered .*forward"):
        pipe.unet.fuse_qkv_projections()
    with pytest.raises(AttributeError, match=r"AutoencoderKL.tiled_decode is not covered .*decode"):
        pipe.vae.tiled_decode(None)
    with pytest.raises(AttributeError, match=r"CLIPTextModel.resize_positions is not covered"):
        pipe.text_encoder.resize_positions(3)
    with pytest.raises(AttributeError, match=r"CLIPTokenizer.apply_chat_template is not covered .*decode"):
        pipe.tokenizer.apply_chat_template("x")
    with pytest.raises(AttributeError, match=r"config.nothing is not covered .*in_channels"):
        _ = pipe.unet.config.nothing
    with pytest.raises(AttributeError, match=r"has no 'attentions'; it has last_hidden_state"):
        _ = pipe.text_encoder(torch.tensor([[1, 2]])).attentions


def test_names_that_cannot_be_imported():
    with pytest.raises(
        ImportError, match=r"DEISMultistepScheduler is not covered by minisd\.diffusers, which has AutoPipeline"
    ):
        from minisd.diffusers import DEISMultistepScheduler  # noqa: F401
    assert not hasattr(dialect, "__nothing__")
    assert {"StableDiffusionPipeline", "NotCoveredError"} <= set(dialect.__all__)


def test_a_safety_checker_is_not_put_in(pipe):
    pipe.safety_checker = None
    with pytest.raises(NOT_COVERED, match="safety_checker=<function"):
        pipe.safety_checker = lambda images, **kwargs: (images, False)
    with pytest.raises(NOT_COVERED, match="safety_checker"):
        dialect.StableDiffusionPipeline(**{**pipe.components, "safety_checker": object()})


def test_a_safety_checker_that_a_folder_has_is_spoken_of(tmp_path):
    import json
    import shutil

    shutil.copytree(FOLDER, tmp_path / "model")
    index = tmp_path / "model/model_index.json"
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index.write_text(json.dumps(json.loads(index.read_text()) | {"safety_checker": checker}))
    with pytest.warns(UserWarning, match="its safety checker is not covered"):
        dialect.StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    dialect.StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)


@pytest.mark.parametrize(
    "settings",
    (
        {"class_labels": torch.ones(1)},
        {"down_block_additional_residuals": ()},
        {"added_cond_kwargs": {"x": 1}},
        {"t": 1},
    ),
    ids=lambda settings: next(iter(settings)),
)
def test_what_a_unet_is_told(pipe, settings):
    x, context = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, pipe.unet.config.cross_attention_dim)
    with pytest.raises(NOT_COVERED, match=f"UNet2DConditionModel: {next(iter(settings))}"):
        pipe.unet(x, 1, context, **settings)
    with pytest.raises(NOT_COVERED, match="three arguments by position"):
        pipe.unet(x, 1, context, torch.ones(1))


def test_what_a_text_encoder_is_told(pipe):
    ids = pipe.tokenizer("red heart", padding="max_length", return_tensors="pt")
    with pytest.raises(NOT_COVERED, match="attention_mask"):
        pipe.text_encoder(**ids)
    with pytest.raises(NOT_COVERED, match="CLIPTextModel: output_attentions=True"):
        pipe.text_encoder(ids.input_ids, output_attentions=True)
    with pytest.raises(ValueError, match="78 tokens: this text encoder takes at most 77"):
        pipe.text_encoder(torch.zeros(1, 78, dtype=torch.int64))


def test_what_a_tokenizer_is_told(pipe):
    for settings in (
        {"padding": "left"},
        {"return_tensors": "tf"},
        {"truncation": "only_first"},
        {"text_pair": "x"},
    ):
        with pytest.raises(NOT_COVERED, match=f"tokenizer: {next(iter(settings))}"):
            pipe.tokenizer("red heart", **settings)


IMPOSSIBLE = {
    "prompt or prompt_embeds": {},
    "prompt and prompt_embeds": {"prompt": "x", "prompt_embeds": torch.ones(1, 77, 128)},
    "negative_prompt and": {"prompt": "x", "negative_prompt": "y", "negative_prompt_embeds": torch.ones(1, 77, 128)},
    "prompt=7": {"prompt": 7},
    "negative_prompt: must be a text or a list": {"prompt": ["x", "y"], "negative_prompt": "z"},
    "negative_prompt: 1 for 2": {"prompt": ["x", "y"], "negative_prompt": ["z"]},
    "generator: 1 given": {"prompt": "x", "num_images_per_prompt": 2, "generator": [torch.Generator()]},
    "output_type='pill'": {"prompt": "x", "output_type": "pill"},
    "multiples of 8": {"prompt": "x", "height": 65, "width": 64},
    "num_inference_steps": {"prompt": "x", "num_inference_steps": 0},
    "clip_skip=99": {"prompt": "x", "clip_skip": 99},
    "callback_on_step_end_tensor_inputs: 'noise'": {"prompt": "x", "callback_on_step_end_tensor_inputs": ["noise"]},
}


@pytest.mark.parametrize("words", IMPOSSIBLE)
def test_impossible_settings(pipe, words):
    with pytest.raises((ValueError, NOT_COVERED), match=words):
        pipe(**IMPOSSIBLE[words])


def test_a_callback_that_returns_nothing(pipe):
    with pytest.raises(TypeError, match="callback_on_step_end: must return a dict of tensors, not None"):
        pipe("x", num_inference_steps=2, callback_on_step_end=lambda *args: None)


def test_impossible_pictures(pipe):
    image = dialect.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    inpaint = dialect.StableDiffusionInpaintPipeline.from_pipe(pipe)
    for bad, words in (
        (PICTURE.convert("RGBA"), "its mode is 'RGBA'"),
        ("a file.png", "must be a PIL image"),
        (None, "must be a PIL image"),
        ([], "must be a PIL image"),
        ([PICTURE, np.zeros((64, 64, 3))], "must be a PIL image"),
        (np.zeros((64, 64)), "not the shape of a picture"),
    ):
        with pytest.raises(ValueError, match=words):
            image("x", bad)
    for strength in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"strength={strength}: must be from 0 to 1"):
            image("x", PICTURE, strength)
    with pytest.raises(ValueError, match="leaves no step"):
        image("x", PICTURE, 0.01, 50)
    with pytest.raises(ValueError, match="leaves no step"):
        inpaint("x", PICTURE, PICTURE, strength=0.0)
    with pytest.raises(ValueError, match="image: 2 of them cannot be shared out to 3"):
        image(["x"] * 3, [PICTURE] * 2)
    with pytest.raises(ValueError, match="mask_image: 2 of them cannot be shared out to 1"):
        inpaint("x", PICTURE, [PICTURE] * 2)
