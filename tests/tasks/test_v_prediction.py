"""v-prediction with zero terminal SNR and trailing steps, from a checkpoint's own configuration to the picture."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import minisd
import minisd.cli
from minisd.tasks import LossGuidance, colour_loss, finish, image_to_image, inpaint, invert, reconstruct
from tests.tasks.conftest import draw_disc, pixels, seeded

pytest.importorskip("diffusers")

CHANGES = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def both(twin, tmp_path_factory):
    """The narrow twin with such a configuration in its folder: the folder, and ours from it."""
    folder = tmp_path_factory.mktemp("v") / "model"
    shutil.copytree(twin[1], folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | CHANGES))
    return folder, minisd.StableDiffusion.load(folder)


@pytest.fixture(scope="module")
def reference(both):
    """diffusers' pipelines from the same folder, by name, loaded once."""
    import diffusers

    text_to_image = diffusers.StableDiffusionPipeline.from_pretrained(both[0])

    def make(kind: str, scheduler: str = "ddim"):
        pipeline = getattr(diffusers, kind)(**text_to_image.components, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        if scheduler == "ddpm":
            pipeline.scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
        return pipeline

    return make


def same(mine, theirs) -> bool:
    return np.array_equal(pixels(*mine), pixels(*theirs))


def test_the_configuration_is_taken(both):
    scheduler = both[1].make_scheduler("ddim")
    scheduler.set_timesteps(8)
    assert {name: scheduler.config[name] for name in CHANGES} == CHANGES
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.timesteps[0] == 999


@pytest.mark.parametrize("settings", ({}, {"eta": 0.6}, {"guidance_rescale": 0.7}, {"guidance_scale": 1.0}), ids=str)
@pytest.mark.parametrize("scheduler", ("ddim", "ddpm"))
def test_text_to_image(both, reference, settings, scheduler):
    pipeline = reference("StableDiffusionPipeline", scheduler)
    theirs = pipeline("a cat", num_inference_steps=4, generator=seeded(), **settings).images
    assert same(both[1].text_to_image("a cat", steps=4, seed=7, scheduler=scheduler, **settings), theirs)


def test_image_to_image(both, reference):
    picture = draw_disc(64, "red")
    pipeline = reference("StableDiffusionImg2ImgPipeline")
    theirs = pipeline("a cat", picture, strength=1.0, num_inference_steps=4, generator=seeded()).images
    steps = image_to_image(both[1], "a cat", picture, strength=1.0, steps=4, seed=7)
    assert same(finish(both[1], steps), theirs)


def test_inpainting(both, reference):
    picture, mask = draw_disc(64, "red"), draw_disc(64, "white", "black")
    pipeline = reference("StableDiffusionInpaintPipeline")
    settings = {"strength": 0.8, "guidance_scale": 3.0}
    theirs = pipeline(
        "a cat", picture, mask, height=64, width=64, num_inference_steps=5, generator=seeded(), **settings
    ).images
    settings |= {"keep_outside": False, "mask_grid": "nearest"}  # diffusers' ways
    assert same(finish(both[1], inpaint(both[1], "a cat", picture, mask, steps=5, seed=7, **settings)), theirs)


def test_inversion_and_a_loss(both):
    """Also from the very first step, where the signal is zero."""
    sd = both[1]
    x = torch.randn(1, 4, 8, 8, generator=seeded())
    settings = {"steps": 4, "guidance_scale": 1.5}
    walk = list(invert(sd, "a cat", x, **settings))
    *_, bottom = reconstruct(sd, "a cat", walk, **settings)
    assert (bottom.latents - x).norm() / x.norm() < 1e-4
    *_, guided = sd.denoise("cat", seed=1, predict_noise=LossGuidance(sd, colour_loss("blue")), **settings)
    assert guided.latents.isfinite().all()


def test_the_command(both, reference, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(both[0]), "--steps", "3", "-s", "7", "--guidance-rescale", "0.7", "-o", "x.png", "-q"]
    monkeypatch.setattr("sys.argv", ["minisd", "generate", "a cat", *options])
    with pytest.raises(SystemExit) as caught:
        minisd.cli.main()
    assert caught.value.code == 0 and capsys.readouterr().out == "x.png\n"
    pipeline = reference("StableDiffusionPipeline")
    theirs = pipeline("a cat", num_inference_steps=3, generator=seeded(), guidance_rescale=0.7).images
    assert same([Image.open("x.png")], theirs)
