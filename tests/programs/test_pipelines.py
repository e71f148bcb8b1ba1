"""The three pipelines, argument by argument, against diffusers': pixel for pixel, on the narrow twin."""

import copy
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import minisd
import minisd.diffusers as dialect
from tests.parity.reference import NARROW, reference_unet
from tests.programs.test_programs import as_tensor

NAMES = {
    "text": "StableDiffusionPipeline",
    "image": "StableDiffusionImg2ImgPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
}


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def loaded(name: str, folder, **settings):
    """Theirs and ours, from the same files.

    Both sides from files: some processors' kernels round by where in memory the weights lie, and those that diffusers
    has just made lie elsewhere than those that it has read.
    """
    return tuple(quiet(getattr(library, name).from_pretrained(folder, **settings)) for library in (diffusers, dialect))


@pytest.fixture(scope="module")
def nine(twin, tmp_path_factory):
    """The twin with a UNet that sees mask and picture too, as diffusers saves it, and as diffusers has it."""
    folder = tmp_path_factory.mktemp("nine")
    torch.manual_seed(1)
    unet = reference_unet(NARROW["unet"], NARROW["text"], in_channels=9)
    parts = {**twin[0].components, "unet": unet}
    diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return loaded("StableDiffusionInpaintPipeline", folder)


@pytest.fixture(scope="module")
def both(twin):
    """A function that gives a pipeline twice, theirs and ours, with new schedulers."""
    theirs, ours = loaded("StableDiffusionPipeline", twin[1])
    config = dict(theirs.scheduler.config)

    def pair(name: str, scheduler: str = "DDIMScheduler", **options):
        kind = NAMES[name]
        mine = getattr(dialect, kind)(**ours.components)
        reference = getattr(diffusers, kind)(**theirs.components, requires_safety_checker=False)
        mine.scheduler = getattr(dialect, scheduler).from_config(config, **options)
        reference.scheduler = getattr(diffusers, scheduler).from_config(config, **options)
        return quiet(reference), quiet(mine)

    return pair


def same(mine, theirs) -> bool:
    """Equal lists of pictures, arrays or tensors."""
    assert type(mine) is type(theirs)
    mine, theirs = ([*one] if isinstance(one, list) else [one] for one in (mine, theirs))
    pairs = [(as_tensor(a), as_tensor(b)) for a, b in zip(mine, theirs, strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def check(pair, *args, steps: int = 3, seeds=(7,), **settings) -> None:
    """Call both, with generators of their own, and compare."""
    theirs, mine = (
        pipe(
            *args,
            num_inference_steps=steps,
            generator=seeded(*seeds) if len(seeds) > 1 else seeded(*seeds)[0],
            **settings,
        ).images
        for pipe in pair
    )
    assert same(mine, theirs)


def scene(width: int = 64, height: int = 64, mode: str = "RGB") -> Image.Image:
    picture = Image.new("RGB", (width, height), (250, 240, 200))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((width // 8, height // 4, width // 2, height - 8), fill="crimson")
    draw.line((0, 0, width, height), fill=(20, 60, 200), width=5)
    return picture.convert(mode)


def hole(width: int = 64, height: int = 64) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).rectangle((width // 4, height // 4, width - 20, height - 12), fill=255)
    return mask


# ------------------------------------------------ text to picture

TEXT_SETTINGS = {
    "plain": {},
    "negative prompt": {"negative_prompt": "blurry, ugly"},
    "three pictures": {"num_images_per_prompt": 3},
    "guidance 1": {"guidance_scale": 1.0},
    "eta": {"eta": 0.8},
    "rescaled": {"guidance_rescale": 0.7},
    "not square": {"height": 72, "width": 40},
    "height alone": {"height": 72},  # which diffusers ignores
    "arrays": {"output_type": "np"},
    "tensors": {"output_type": "pt"},
    "latents": {"output_type": "latent"},
    "neutral": {"timesteps": None, "cross_attention_kwargs": {}, "ip_adapter_image": None},
}


@pytest.mark.parametrize("settings", TEXT_SETTINGS.values(), ids=TEXT_SETTINGS)
def test_text_to_picture(both, settings):
    check(both("text"), "a red heart", **settings)


@pytest.mark.parametrize("settings", ({}, {"eta": 0.5}, {"guidance_scale": 1.0}), ids=str)
def test_ddpm(both, settings):
    check(both("text", "DDPMScheduler"), "a red heart", **settings)


def test_several_prompts_each_with_its_negative(both):
    pair = both("text")
    check(pair, ["a cat", "two dogs"], negative_prompt=["ugly", ""], num_images_per_prompt=2, eta=0.3)


def test_a_generator_for_each_picture(both):
    check(both("text"), "a cat", num_images_per_prompt=2, seeds=(1, 2), eta=0.5)


def test_a_prompt_that_is_too_long(both):
    check(both("text"), "one two three four five " * 20)


def test_given_latents(both):
    check(both("text"), "a cat", latents=torch.randn(1, 4, 8, 8, generator=seeded(3)[0]))


def test_global_randomness(both):
    pictures = []
    for pipe in both("text"):
        torch.manual_seed(11)
        pictures.append(pipe("a cat", num_inference_steps=3).images)
    assert same(pictures[1], pictures[0])


@pytest.mark.parametrize("guidance_scale", (1.0, 5.0))
def test_given_embeddings(both, guidance_scale):
    theirs, mine = both("text")
    embeds = mine.encode_prompt(["a cat", "a dog"], "cpu", 1, True, ["bad", "worse"])
    for a, b in zip(embeds, theirs.encode_prompt(["a cat", "a dog"], "cpu", 1, True, ["bad", "worse"]), strict=True):
        assert torch.equal(a, b)
    given = {"prompt_embeds": embeds[0], "guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    check((theirs, mine), **given)
    check((theirs, mine), **given, negative_prompt_embeds=embeds[1])
    check((theirs, mine), **given, negative_prompt=["bad", "worse"])


@pytest.mark.parametrize("clip_skip", (0, 1, 3))
def test_clip_skip(both, clip_skip):
    """diffusers' own asks for a name that transformers has given up: so the reference gets embeddings."""
    theirs, mine = both("text")
    ids = theirs.tokenizer("a cat", padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    states = theirs.text_encoder(ids, output_hidden_states=True).hidden_states
    skipped = theirs.text_encoder.final_layer_norm(states[-1 - clip_skip])
    expected = theirs(prompt_embeds=skipped, num_inference_steps=3, generator=seeded(7)[0]).images
    assert same(mine("a cat", clip_skip=clip_skip, num_inference_steps=3, generator=seeded(7)[0]).images, expected)


def test_tuple(both):
    theirs, mine = (
        pipe("a cat", num_inference_steps=2, generator=seeded(7)[0], return_dict=False) for pipe in both("text")
    )
    assert same(mine[0], theirs[0]) and mine[1] is theirs[1] is None and len(mine) == len(theirs)


def test_a_callback_that_changes_things(both):
    """It sees each step's tensors; latents, text and guidance that it changes are what the walk goes on with."""

    def walk(pipe):
        seen = []

        def meddle(pipeline, index, timestep, tensors):
            assert pipeline is pipe and set(tensors) == {"latents", "prompt_embeds", "negative_prompt_embeds"}
            seen.extend((torch.tensor(index), timestep, *(value.clone() for value in tensors.values())))
            if index == 1:
                tensors["latents"] = tensors["latents"] * 1.05
            if index == pipe.num_timesteps // 2:
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
                pipeline._guidance_scale = 0.0
            return tensors

        names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
        images = pipe(
            "a cat",
            num_inference_steps=6,
            generator=seeded(7)[0],
            callback_on_step_end=meddle,
            callback_on_step_end_tensor_inputs=names,
        ).images
        return seen, images

    (seen, images), (my_seen, my_images) = map(walk, both("text"))
    assert len(seen) == 6 * 5 and same(my_seen, seen) and same(my_images, images)


def test_a_callback_that_interrupts(both):
    def stop(pipe, index, timestep, tensors):
        pipe._interrupt = index == 2
        return tensors

    check(both("text"), "a cat", steps=6, callback_on_step_end=stop)
    theirs, mine = both("text")
    check((theirs, mine), "a cat")  # and the next call begins anew
    assert not mine.interrupt


# ------------------------------------------------ picture to picture


@pytest.mark.parametrize("strength", (0.3, 0.5, 0.77, 1.0))
@pytest.mark.parametrize("settings", ({}, {"eta": 0.5, "negative_prompt": "ugly"}, {"guidance_scale": 1.0}), ids=str)
def test_picture_to_picture(both, strength, settings):
    check(both("image"), "a red heart", scene(), strength, steps=7, **settings)


@pytest.mark.parametrize("scheduler", ("DDIMScheduler", "DDPMScheduler"))
def test_pictures_of_other_kinds(both, scheduler):
    pair = both("image", scheduler)
    array = np.asarray(scene()).astype(np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    check(pair, "a cat", scene(75, 61))
    check(pair, ["a cat", "a dog"], [scene(), scene().rotate(90)], num_images_per_prompt=2)
    check(pair, "a cat", array)
    check(pair, "a cat", np.stack([array] * 2), num_images_per_prompt=2)
    check(pair, "a cat", tensor)
    check(pair, "a cat", tensor[None, :, :57])
    check(pair, "a cat", torch.randn(1, 4, 8, 8, generator=seeded(2)[0]))
    with pytest.warns(FutureWarning):
        check(pair, "a cat", 2 * tensor[None] - 1)


def test_picture_to_picture_with_a_generator_for_each(both):
    check(both("image"), "a cat", scene(), num_images_per_prompt=3, seeds=(1, 2, 3), eta=0.4)


def test_picture_to_picture_into_latents(both):
    check(both("image"), "a cat", scene(), output_type="latent")


# ------------------------------------------------ inpainting

MASK_SETTINGS = {
    "plain": {},
    "strength": {"strength": 0.6},
    "random": {"eta": 0.7, "strength": 0.8},
    "guidance 1": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "ugly", "num_images_per_prompt": 2},
    "other size": {"height": 72, "width": 56},
    "latents": {"latents": torch.full((1, 4, 8, 8), 0.3), "output_type": "latent"},
    "latents and strength": {"latents": torch.full((1, 4, 8, 8), 0.3), "strength": 0.5},
    "masked latents": {"masked_image_latents": torch.full((1, 4, 8, 8), -0.2)},
}


@pytest.mark.parametrize("settings", MASK_SETTINGS.values(), ids=MASK_SETTINGS)
@pytest.mark.parametrize("channels", (4, 9))
def test_painting_into_a_mask(both, nine, channels, settings):
    check(both("inpaint") if channels == 4 else nine, "a red heart", scene(), hole(), steps=4, **settings)


def test_masks_with_ddpm(both):
    """The masked picture's latents are drawn even where nothing looks at them: later noise depends on it."""
    check(both("inpaint", "DDPMScheduler"), "a cat", scene(), hole(), strength=0.9)


@pytest.mark.parametrize("channels", (4, 9))
def test_masks_of_other_kinds(both, nine, channels):
    pair = both("inpaint") if channels == 4 else nine
    mask = np.asarray(hole()).astype(np.float32) / 255
    tensor = torch.from_numpy(mask)
    check(pair, "a cat", scene(90, 70), hole(90, 70).convert("RGB"))
    check(pair, ["a cat", "a dog"], [scene(), scene().rotate(90)], [hole(), hole().rotate(90)])
    for one in (mask, mask[None], mask[..., None], mask[None, ..., None], 0.8 * mask):
        check(pair, "a cat", np.asarray(scene()).astype(np.float32) / 255, one)
    for one in (tensor, tensor[None], tensor[None, None]):
        check(pair, "a cat", scene(), one)
    check(pair, "a cat", torch.full((1, 4, 8, 8), 0.1), tensor, masked_image_latents=torch.full((1, 4, 8, 8), 0.1))


@pytest.mark.parametrize("channels", (4, 9))
def test_a_generator_for_each_image(both, nine, channels):
    pair = both("inpaint") if channels == 4 else nine
    pictures = [scene(), scene().rotate(90)]
    check(pair, ["a cat", "a dog"], pictures, [hole()] * 2, seeds=(1, 2), strength=0.7, eta=0.5)


def test_a_callback_that_moves_the_mask(nine):
    def shrink(pipe, index, timestep, tensors):
        return {"mask": tensors["mask"] * 0.5, "masked_image_latents": tensors["masked_image_latents"] + 0.1}

    names = ["mask", "masked_image_latents"]
    settings = {"callback_on_step_end": shrink, "callback_on_step_end_tensor_inputs": names}
    check(nine, "a cat", scene(), hole(), **settings)


# ------------------------------------------------ files


def test_saved_here_loaded_there(both, tmp_path):
    _, mine = both("text", "DDPMScheduler")
    mine.save_pretrained(tmp_path / "model")
    pair = loaded("StableDiffusionPipeline", tmp_path / "model")
    assert [type(one.scheduler).__name__ for one in pair] == ["DDPMScheduler"] * 2
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")) is type(pair[0])
    check(pair, "a cat")
    assert same_weights(pair[1], mine)


def same_weights(one, other) -> bool:
    names = ("unet", "vae", "text_encoder")
    parts = [(getattr(one, name).state_dict(), getattr(other, name).state_dict()) for name in names]
    return all(a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in parts)


def test_a_single_file(both, ours, tmp_path):
    ours.save(tmp_path / "model.safetensors", layout="compvis")
    pipe = quiet(dialect.StableDiffusionPipeline.from_single_file(tmp_path / "model.safetensors"))
    assert same_weights(pipe, both("text")[1])
    again = minisd.StableDiffusion.load(tmp_path / "model.safetensors")
    mine = pipe("a cat", num_inference_steps=3, generator=seeded(7)[0]).images
    assert same(mine, again.text_to_image("a cat", steps=3, seed=7))


def test_a_single_file_that_says_nothing(ours, twin, tmp_path):
    """Unless minisd wrote it, it stands for SD 1.5, and that has PNDM; or a folder beside it says what it has."""
    path = tmp_path / "model.safetensors"
    ours.save(path, layout="compvis")
    save_file(load_file(path), path)  # and the metadata are gone
    load = dialect.StableDiffusionPipeline.from_single_file
    assert type(load(path).scheduler) is dialect.PNDMScheduler
    pipe = quiet(load(path, config=twin[1]))
    size = {"height": 64, "width": 64}  # shapes cannot tell that the twin is for small pictures
    mine = pipe("a cat", num_inference_steps=3, generator=seeded(7)[0], **size).images
    assert same(mine, minisd.StableDiffusion.load(path).text_to_image("a cat", steps=3, seed=7, **size))


def test_half_precision(twin, both):
    pair = [
        quiet(kind.StableDiffusionPipeline.from_pretrained(twin[1], dtype=torch.float16))
        for kind in (diffusers, dialect)
    ]
    assert pair[1].dtype == pair[1].text_encoder.dtype == torch.float16
    check(pair, "a cat", steps=2)
    moved = both("text")[1]
    copy = dialect.StableDiffusionPipeline.from_pretrained(twin[1]).to("cpu", torch.float16)
    assert copy.unet.dtype == torch.float16 and moved.dtype == torch.float32
    check((pair[0], quiet(copy)), "a cat", steps=2)


def test_a_named_variant(twin, both, tmp_path):
    halves = diffusers.StableDiffusionPipeline.from_pretrained(twin[1], dtype=torch.float16)
    halves.save_pretrained(tmp_path, variant="fp16")
    for component in ("unet", "vae", "text_encoder"):  # a plain file too, that is not the one
        for path in (twin[1] / component).glob("*.safetensors"):
            shutil.copy(path, tmp_path / component)
    pair = loaded("StableDiffusionPipeline", tmp_path, variant="fp16", dtype=torch.float32)
    check(pair, "a cat", steps=2, output_type="latent")
    plain = dialect.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert not torch.equal(plain.unet.core.conv_in.weight, pair[1].unet.core.conv_in.weight)
    with pytest.raises(ValueError, match="no fp16 variant"):
        dialect.UNet2DConditionModel.from_pretrained(twin[1], subfolder="unet", variant="fp16")
    with pytest.raises(ValueError, match="no fp16 variant"):
        dialect.StableDiffusionPipeline.from_pretrained(twin[1], variant="fp16")


@pytest.mark.parametrize("name", NAMES)
def test_schedules_that_pipelines_correct(twin, tmp_path, name):
    """As they are made; not a scheduler that comes later."""
    shutil.copytree(twin[1], tmp_path / "model")
    path = tmp_path / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": True, "steps_offset": 0}))
    theirs, mine = loaded(NAMES[name], tmp_path / "model")
    for key in ("clip_sample", "steps_offset"):
        assert mine.scheduler.config[key] == theirs.scheduler.config[key]
    inputs = {"text": (), "image": (scene(), 0.7), "inpaint": (scene(), hole())}[name]
    check((theirs, mine), "a cat", *inputs)
    for pipe, library in ((theirs, diffusers), (mine, dialect)):
        pipe.scheduler = library.DDIMScheduler.from_pretrained(tmp_path / "model", subfolder="scheduler")
    assert mine.scheduler.config.steps_offset == theirs.scheduler.config.steps_offset == 0
    check((theirs, mine), "a cat", *inputs)


def test_a_scheduler_that_minisd_has_not(twin, both, tmp_path):
    """Its settings can be read and used, itself not."""
    theirs = both("text")[0]
    theirs.scheduler = diffusers.DEISMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.save_pretrained(tmp_path)
    theirs, mine = loaded("StableDiffusionPipeline", tmp_path)
    with pytest.raises(
        AttributeError, match=r"DEISMultistepScheduler\.set_timesteps is not covered.* DDIMScheduler\.from_config"
    ):
        mine("a cat", num_inference_steps=2)
    mine.save_pretrained(tmp_path / "again")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    assert type(again.scheduler).__name__ == "DEISMultistepScheduler"
    for pipe, library in ((theirs, diffusers), (mine, dialect)):
        pipe.scheduler = library.DDIMScheduler.from_config(pipe.scheduler.config)
    check((theirs, mine), "a cat")


def test_parts_are_shared_and_replaced(twin, both):
    _, mine = both("text")
    other = dialect.StableDiffusionImg2ImgPipeline.from_pipe(mine)
    assert other.unet is mine.unet and other.components.keys() == twin[0].components.keys()
    vae = dialect.AutoencoderKL.from_pretrained(twin[1], subfolder="vae")
    assert dialect.StableDiffusionPipeline.from_pretrained(twin[1], vae=vae).vae is vae


def test_numbers_that_programs_ask_for(both):
    theirs, mine = both("text")
    assert mine.vae_scale_factor == theirs.vae_scale_factor
    assert mine.device == theirs.device and mine.dtype == theirs.dtype
    for part in ("unet", "vae", "text_encoder"):
        config = getattr(theirs, part).config
        for name, value in getattr(mine, part).config.items():
            if name not in ("_class_name", "architectures", "model_type", "dropout", "use_attention_mask"):
                assert getattr(config, name) == value, (part, name)
    for name, value in mine.unet.config.items():
        assert theirs.unet.config[name] == value
    assert not (mine.unet.training or mine.vae.training or mine.text_encoder.encoder.training)
    assert (mine.unet.in_channels, mine.vae.latent_channels) == (4, 4)  # as older programs ask


def test_calls_that_save_memory(both):
    """They change nothing here. In diffusers slicing takes other kernels, which round otherwise."""
    _, mine = both("text")
    before = mine("a cat", num_inference_steps=2, generator=seeded(7)[0], output_type="np").images
    mine.enable_attention_slicing()
    mine.enable_xformers_memory_efficient_attention()
    mine.enable_vae_slicing()
    mine.enable_vae_tiling()
    after = mine("a cat", num_inference_steps=2, generator=seeded(7)[0], output_type="np").images
    assert np.array_equal(before, after)
    sliced = mine.vae.decode(torch.ones(2, 4, 8, 8)).sample
    assert torch.equal(sliced[:1], mine.vae.decode(torch.ones(1, 4, 8, 8)).sample)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cannot be used here"):
            mine.enable_model_cpu_offload()
    mine.disable_attention_slicing()
    mine.disable_xformers_memory_efficient_attention()
    mine.disable_vae_slicing()
    mine.disable_vae_tiling()
    assert not mine.vae.use_slicing and not mine.vae.use_tiling


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_are_blended_as_theirs(both, dtype):
    theirs, mine = (copy.deepcopy(pipe.vae).to(dtype) for pipe in both("text"))
    z, images = torch.randn(2, 4, 19, 9).to(dtype), torch.randn(1, 3, 72, 136).to(dtype)
    whole = mine.decode(z).sample
    for vae in (theirs, mine):
        vae.enable_tiling()
    assert torch.equal(mine.decode(z).sample, theirs.decode(z).sample)
    assert torch.equal(mine.encode(images).latent_dist.mean, theirs.encode(images).latent_dist.mean)
    assert not torch.equal(mine.decode(z).sample, whole)


@torch.no_grad()
def test_decoding_rounds_as_theirs_does(both):
    """Latents are multiplied by one over the factor here, and divided by the factor in a call."""
    theirs, mine = both("text")
    latents = torch.randn(1, 4, 8, 8, generator=seeded(3)[0])
    arrays = theirs.decode_latents(latents), mine.decode_latents(latents)
    assert same(arrays[1], arrays[0])
    assert same(mine.numpy_to_pil(arrays[1]), theirs.numpy_to_pil(arrays[0]))


def test_progress(both, capsys):
    _, mine = both("text")
    mine("a cat", num_inference_steps=2)
    assert capsys.readouterr().err == ""
    mine.set_progress_bar_config(desc="generating")
    mine("a cat", num_inference_steps=2)
    assert "generating: 100%" in capsys.readouterr().err
