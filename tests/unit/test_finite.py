"""Numbers that are not finite are told on every way out; settings that would make them are refused before."""

import numpy as np
import pytest
import torch
from PIL import Image

import minisd
from minisd.pipeline import rescale_guidance, to_pictures
from minisd.sampling import Step
from minisd.schedulers import DDIMScheduler, DDPMScheduler, named
from minisd.tasks import finish, image_to_image, mean_latents
from minisd.warn import watched
from tests.unit.tiny import tiny_model

NAN = float("nan")


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_images_and_latents_are_told(value):
    sd = tiny_model()
    sd.unet.conv_out.bias.data[0] = value
    with pytest.warns(minisd.NonFiniteWarning, match=r"latents of step 1 \(timestep \d+\): NaN or .*--check.*bfl"):
        *_, last = sd.denoise("x", steps=2, seed=1)
    with pytest.warns(minisd.NonFiniteWarning, match="images out of the VAE"):
        (picture,) = to_pictures(sd.decode(last.latents))
    assert np.asarray(picture).max() == 0
    with pytest.warns(minisd.NonFiniteWarning) as caught:  # once for all steps
        list(sd.denoise("x", steps=4, seed=1))
    assert len(caught) == 1


@pytest.mark.parametrize("left", [False, True])
def test_an_accelerator_is_asked_at_the_end(left, monkeypatch):
    """In the place of one: latents that say so."""

    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")

    latents = [torch.zeros(1).as_subclass(Elsewhere), *(torch.full((1,), NAN).as_subclass(Elsewhere) for _ in range(2))]
    steps = watched(Step(index, 10 * index, one, one) for index, one in enumerate(latents))
    asked = []
    monkeypatch.setattr(Elsewhere, "__bool__", lambda self: asked.append(self) or bool(self.as_subclass(torch.Tensor)))
    next(steps), next(steps)
    assert not asked
    with pytest.warns(minisd.NonFiniteWarning, match="step 2 \\(timestep 10\\)") as caught:
        steps.close() if left else list(steps)
    assert len(caught) == 1


def test_part_of_an_image(recwarn):
    images = torch.zeros(2, 3, 2, 2)
    assert not recwarn.list and np.asarray(to_pictures(images)[0]).min() == 128
    images[1, 0, 0, 0] = NAN
    with pytest.warns(minisd.NonFiniteWarning):
        pictures = to_pictures(images)
    assert np.asarray(pictures[1])[..., 0].tolist() == [[0, 128], [128, 128]]


def test_the_encoder_of_the_vae():
    sd = tiny_model()
    sd.vae.encoder.conv_in.bias.data[:] = NAN
    picture = Image.new("RGB", (64, 64))
    with pytest.warns(minisd.NonFiniteWarning, match="out of the VAE's encoder"):
        mean_latents(sd, torch.zeros(1, 3, 64, 64))
    with pytest.warns(minisd.NonFiniteWarning, match="out of the VAE's encoder"):
        finish(sd, image_to_image(sd, "x", picture, steps=2, seed=1))


def test_the_dialect():
    from minisd.diffusers.image_processor import VaeImageProcessor

    with pytest.warns(minisd.NonFiniteWarning, match="out of the VAE"):
        VaeImageProcessor().postprocess(torch.full((1, 3, 8, 8), NAN), "pt")


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm"])
def test_epsilon_at_zero_terminal_snr_is_refused_before_the_first_step(name, spacing):
    sd = tiny_model()
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": spacing}
    scheduler = named(name)[0].from_config(sd.scheduler_config, **zero, prediction_type="epsilon")
    with pytest.raises(ValueError, match="epsilon with zero terminal SNR: timestep 999 is pure noise"):
        sd.denoise("x", steps=4, seed=1, scheduler=scheduler)
    scheduler = named(name)[0].from_config(sd.scheduler_config, **zero, prediction_type="v_prediction")
    *_, last = sd.denoise("x", steps=4, seed=1, scheduler=scheduler)
    assert last.latents.isfinite().all()


def test_epsilon_from_a_step_that_is_not_pure_noise():
    sd = tiny_model()
    kinds = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "epsilon"}
    for kind in (DDIMScheduler, DDPMScheduler):
        settings = {"steps": 4, "seed": 1, "scheduler": kind.from_config(sd.scheduler_config, **kinds)}
        *_, last = sd.denoise("x", latents=torch.zeros(1, 4, 8, 8), start=1, **settings)
        assert last.latents.isfinite().all()


@pytest.mark.parametrize("steps", [3, 10, 25])
def test_eta_at_zero_terminal_snr(steps):
    """1 - alpha_bar - sigma^2 is 0 but for rounding, and negative for some numbers of steps."""
    sd = tiny_model()
    kinds = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    scheduler = DDIMScheduler.from_config(sd.scheduler_config, **kinds)
    for eta in (1.0, 0.999):
        try:
            *_, last = sd.denoise("x", steps=steps, seed=1, scheduler=scheduler, eta=eta)
        except ValueError as error:
            assert eta == 1.0 and "eta=1.0: with zero terminal SNR must be below 1" in str(error)
        else:
            assert last.latents.isfinite().all()


def test_rescaling_a_flat_prediction():
    """Its standard deviation is 0, whatever it is divided by."""
    flat, positive = torch.zeros(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert not rescale_guidance(flat, positive, 0.7).any()
    constant = torch.full((1, 4, 3, 3), 2.0)
    assert torch.equal(rescale_guidance(constant, constant, 0.7), constant)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++_2m", "euler", "unipc"])
def test_as_many_steps_as_there_are_timesteps(name, spacing):
    """They are taken, or refused as steps before the first one."""
    sd = tiny_model()
    kind, settings = named(name)
    scheduler = kind.from_config(sd.scheduler_config, **settings, timestep_spacing=spacing)

    def predict_noise(x, *_):
        return 0.1 * x

    try:
        *_, last = sd.denoise("x", steps=1000, seed=1, scheduler=scheduler, predict_noise=predict_noise)
    except ValueError as error:
        assert str(error).startswith(f"steps=1000: too many for this scheduler with {spacing} spacing")
        assert name != "euler"
    else:
        assert last.latents.isfinite().all()
