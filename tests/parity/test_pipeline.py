"""Whole pictures against diffusers' pipeline, pixel for pixel, from the narrow twin and from the embedded model."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler as ReferenceDDIM
from diffusers import DDPMScheduler as ReferenceDDPM
from diffusers import StableDiffusionPipeline

import minisd

SETTINGS = {
    "guidance 7.5": {},
    "guidance 1": {"guidance_scale": 1.0},
    "eta 0.7": {"eta": 0.7},
    "eta 1": {"eta": 1.0, "guidance_scale": 3.0},
    "negative prompt": {"negative_prompt": "blurry, ugly"},
    "guidance rescale": {"guidance_rescale": 0.7},
    "not square": {"height": 72, "width": 56},
    "odd latents": {"height": 40, "width": 104},
}


def same(mine: list, theirs: list) -> bool:
    return len(mine) == len(theirs) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(mine, theirs, strict=True)
    )


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ddim(twin, ours, settings):
    theirs = twin[0]("a red heart", num_inference_steps=6, generator=seeded(), **settings).images
    assert same(ours.text_to_image("a red heart", steps=6, seed=7, **settings), theirs)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_ddpm(twin, ours, settings):
    pipeline = StableDiffusionPipeline(**twin[0].components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = ReferenceDDPM.from_config(pipeline.scheduler.config)
    theirs = pipeline("a red heart", num_inference_steps=6, generator=seeded(), **settings).images
    assert same(ours.text_to_image("a red heart", steps=6, seed=7, scheduler="ddpm", **settings), theirs)


def test_several_prompts_and_images(twin, ours):
    prompts, negatives = ["a cat", "two dogs"], ["ugly", ""]
    theirs = twin[0](
        prompts, negative_prompt=negatives, num_images_per_prompt=3, num_inference_steps=4, generator=seeded()
    ).images
    mine = ours.text_to_image(prompts, negative_prompt=negatives, images_per_prompt=3, steps=4, seed=7)
    assert len(mine) == 6 and same(mine, theirs)


def test_a_generator_for_each_image(twin, ours):
    seeds = [[seeded(1), seeded(2)], [seeded(1), seeded(2)]]
    theirs = twin[0]("a cat", num_images_per_prompt=2, num_inference_steps=4, generator=seeds[0], eta=0.5).images
    mine = ours.text_to_image("a cat", images_per_prompt=2, steps=4, generator=seeds[1], eta=0.5)
    assert same(mine, theirs)


def test_given_latents(twin, ours):
    latents = torch.randn(1, 4, 8, 8, generator=seeded())
    theirs = twin[0]("a cat", num_inference_steps=4, latents=latents).images
    assert same(ours.text_to_image("a cat", steps=4, latents=latents), theirs)


@pytest.mark.parametrize(
    "changes",
    (
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"timestep_spacing": "linspace", "set_alpha_to_one": True},
        {"thresholding": True, "prediction_type": "sample"},
    ),
    ids=lambda changes: ", ".join(changes),
)
def test_other_schedules(twin, ours, changes):
    pipeline = StableDiffusionPipeline(**twin[0].components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = ReferenceDDIM.from_config(pipeline.scheduler.config, **changes)
    theirs = pipeline("a cat", num_inference_steps=7, generator=seeded(), guidance_rescale=0.7).images
    scheduler = minisd.DDIMScheduler.from_config(ours.config.scheduler, **changes)
    assert same(ours.text_to_image("a cat", steps=7, seed=7, guidance_rescale=0.7, scheduler=scheduler), theirs)


def test_a_schedule_that_the_pipeline_corrects(twin, tmp_path):
    """diffusers' pipeline forces `clip_sample=False` and `steps_offset=1` on the folder's scheduler."""
    shutil.copytree(twin[1], tmp_path / "model")
    path = tmp_path / "model/scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": True, "steps_offset": 0}))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline("a cat", num_inference_steps=4, generator=seeded()).images
    assert same(minisd.StableDiffusion.load(tmp_path / "model").text_to_image("a cat", steps=4, seed=7), theirs)


def test_every_step(twin, ours):
    """Not only the last picture: the latents after each step, and the timesteps."""
    seen = []

    def record(pipeline, index, timestep, tensors):
        seen.append((index, int(timestep), tensors["latents"]))
        return {}

    twin[0]("a cat", num_inference_steps=5, generator=seeded(), callback_on_step_end=record)
    steps = list(ours.denoise("a cat", steps=5, seed=7))
    assert [(step.index, step.timestep) for step in steps] == [(index, t) for index, t, _ in seen]
    assert all(torch.equal(step.latents, latents) for step, (_, _, latents) in zip(steps, seen, strict=True))


def test_global_randomness(twin, ours):
    """Without seed or generator, torch's global generator, as in diffusers."""
    torch.manual_seed(11)
    theirs = twin[0]("a cat", num_inference_steps=3).images
    torch.manual_seed(11)
    assert same(ours.text_to_image("a cat", steps=3), theirs)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_starts_from_the_same_noise(twin, dtype):
    """The noise is drawn in the model's dtype, which gives other numbers than drawing float32 and rounding."""
    sd = minisd.StableDiffusion.load(twin[1], dtype=dtype)
    noise = sd.initial_noise((1, 4, 8, 8), seeded(), None)
    assert noise.dtype == dtype and torch.equal(noise, torch.randn(1, 4, 8, 8, generator=seeded(), dtype=dtype))


@pytest.fixture(scope="module")
def embedded():
    """The model that comes with minisd, in diffusers and here: diffusers loads the folder unchanged."""
    from minisd.checkpoint.hub import embedded_model

    # Without a dtype transformers 5 would keep the text encoder in the file's float16, and diffusers fail.
    pipeline = StableDiffusionPipeline.from_pretrained(embedded_model(), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, minisd.StableDiffusion.load()


@pytest.mark.parametrize("prompt", ("red heart", "a tomato on a blue background", ""))
@pytest.mark.parametrize(
    "settings",
    ({"guidance_scale": 7.5}, {"guidance_scale": 1.0}, {"guidance_scale": 7.5, "eta": 0.7, "negative_prompt": "blue"}),
    ids=str,
)
def test_embedded_model(embedded, prompt, settings):
    theirs = embedded[0](prompt, num_inference_steps=10, generator=seeded(), **settings).images
    assert same(embedded[1].text_to_image(prompt, steps=10, seed=7, **settings), theirs)


# ------------------------------------------------ every scheduler, whole images

OTHERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_scheduler(twin, ours, name):
    import diffusers

    theirs, (kind, arguments) = twin[0], OTHERS[name]
    scheduler = getattr(diffusers, kind).from_config(theirs.scheduler.config, **arguments)
    pipeline = type(theirs)(**{**theirs.components, "scheduler": scheduler}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    reference = pipeline("a cat", num_inference_steps=6, generator=seeded()).images
    assert same(ours.text_to_image("a cat", steps=6, seed=7, scheduler=name), reference)


def test_the_models_own_scheduler(ours):
    own = minisd.StableDiffusion(**ours.modules, tokenizer=ours.tokenizer, scheduler=dict(ours.scheduler_config))
    own.scheduler_config["_class_name"] = "PNDMScheduler"
    settings = {"steps": 4, "seed": 1}
    found = own.text_to_image("a cat", scheduler="model", **settings)
    scheduler = minisd.PNDMScheduler.from_config(own.scheduler_config)
    assert same(found, own.text_to_image("a cat", scheduler=scheduler, **settings))
    assert not same(found, own.text_to_image("a cat", **settings))


def test_a_default_size_that_is_not_square(twin, tmp_path):
    """`sample_size=[8, 12]` in a folder is height and width, here, in the dialect and when it is saved again."""
    from minisd.diffusers import StableDiffusionPipeline as Dialect

    folder = shutil.copytree(twin[1], tmp_path / "model")
    config = json.loads((folder / "unet" / "config.json").read_text()) | {"sample_size": [8, 12]}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    reference = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    theirs = reference("a cat", num_inference_steps=3, generator=seeded()).images
    assert theirs[0].size == (96, 64)
    sd = minisd.StableDiffusion.load(folder)
    assert same(sd.text_to_image("a cat", steps=3, seed=7), theirs)
    assert same(Dialect.from_pretrained(folder)("a cat", num_inference_steps=3, generator=seeded()).images, theirs)
    sd.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "unet" / "config.json").read_text())["sample_size"] == [8, 12]
