"""Inpainting models in every task: refused as `generate` refuses them, or at work where the task is inpainting."""

import pytest
import torch

from minisd.tasks import (
    LossGuidance,
    colour_loss,
    compose,
    edit,
    image_to_image,
    inpaint,
    interpolate,
    invert,
)
from tests.tasks.conftest import draw_disc
from tests.unit.tiny import tiny_model

NOISE = torch.ones(1, 4, 8, 8)
PICTURE, MASK = draw_disc(64, "red"), draw_disc(64, "white", "black")
TASKS = {
    "text to image": lambda sd: sd.denoise("x", steps=2),
    "compose": lambda sd: sd.denoise("x", steps=2, predict_noise=compose(sd, [("y", 0.5)])),
    "guide": lambda sd: sd.denoise("x", steps=2, predict_noise=LossGuidance(sd, colour_loss("blue"))),
    "image to image": lambda sd: image_to_image(sd, "x", PICTURE, steps=2),
    "interpolate": lambda sd: interpolate(sd, ("x", "y"), (NOISE, -NOISE), frames=2, steps=2),
    "invert, exact": lambda sd: invert(sd, "x", NOISE, steps=2),
    "invert, plain": lambda sd: invert(sd, "x", NOISE, steps=2, exact=False),
    "edit": lambda sd: edit(sd, "x", "y", NOISE, steps=2),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_refused_by_name(task):
    with pytest.raises(ValueError, match=r"this UNet takes 9 channels, not 4 .an inpainting model.*text alone"):
        list(task(tiny_model(in_channels=9)))


@pytest.mark.parametrize("channels", [4, 9])
def test_guidance_inside_of_inpainting(channels):
    """Several prompts, and a loss, work under a mask with both kinds of checkpoint."""
    sd = tiny_model(in_channels=channels)
    found = []
    for predict_noise in (None, compose(sd, [("y", 0.5)], 0.5), LossGuidance(sd, colour_loss("blue"), scale=3.0)):
        steps = inpaint(sd, "x", PICTURE, MASK, steps=2, seed=1, predict_noise=predict_noise)
        *_, last = steps
        found.append(last.latents)
    assert all(not torch.equal(found[0], other) and other.isfinite().all() for other in found[1:])


@pytest.mark.parametrize("channels", [3, 5])
def test_latents_of_another_model(channels):
    sd, latents = tiny_model(), torch.ones(1, channels, 8, 8)
    for call in (lambda: sd.denoise("x", latents=latents, steps=1), lambda: invert(sd, "x", latents, steps=2)):
        with pytest.raises(ValueError, match=r"latents have the shape .*must be"):
            call()
    with pytest.raises(ValueError, match="must have one shape"):
        interpolate(sd, ("x", "y"), (latents, NOISE), steps=1)
    with pytest.raises(ValueError, match="latents have the shape"):
        interpolate(sd, ("x", "y"), (latents, latents), steps=1)
