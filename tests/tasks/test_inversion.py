"""Inversion comes back, exactly if it says so; plain DDIM does not under guidance; editing keeps what it should."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import minisd
from minisd.tasks import edit, finish, invert, mean_latents, round_trip, to_images
from minisd.tasks.inversion import solve
from tests.tasks.conftest import draw_disc, latents_of, pixels, refused

STRONG = {"steps": 50, "guidance_scale": 7.5}


@pytest.fixture(scope="module")
def trips(emoji, disc):
    """The red disc up and down again under guidance 7.5, in both ways."""
    latents = latents_of(emoji, disc)
    found = {}
    for exact in (False, True):
        up = invert(emoji, "red circle", latents, exact=exact, **STRONG)
        found[exact] = round_trip(emoji, "red circle", latents, [disc], up, **STRONG)
    return found


def test_the_exact_way_comes_back_under_guidance(trips):
    """Within 0.1 dB of what the VAE alone loses."""
    trip = trips[True]
    assert abs(trip.psnr[0] - trip.limit[0]) < 0.1 and trip.error < 1e-3 and trip.missed < 0.15, trip


def test_the_plain_way_does_not(trips):
    assert trips[False].psnr[0] < trips[False].limit[0] - 5 and trips[False].error > 0.3


def test_without_guidance_the_plain_way_nearly_does(emoji, disc):
    latents, settings = latents_of(emoji, disc), {"steps": 20, "guidance_scale": 1.0}
    plain, exact = (
        round_trip(
            emoji,
            "red circle",
            latents,
            [disc],
            invert(emoji, "red circle", latents, exact=exact, **settings),
            **settings,
        )
        for exact in (False, True)
    )
    assert exact.error < 1e-3 < plain.error < 0.5


def test_the_plain_way_is_diffusers_inverse(twin, ours):
    """Step for step, against diffusers' own UNet and scheduler."""
    pytest.importorskip("diffusers")
    from diffusers import DDIMInverseScheduler

    pipeline = twin[0]
    scheduler = DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(6)
    start = x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = []
    with torch.no_grad():
        negative, positive = pipeline.encode_prompt("a cat", "cpu", 1, True)[::-1]
        for t in scheduler.timesteps:
            context = torch.cat([negative, positive])
            unwanted, wanted = pipeline.unet(torch.cat([x, x]), t, context).sample.chunk(2)
            x = scheduler.step(unwanted + 3 * (wanted - unwanted), t, x).prev_sample
            theirs.append(x)
    steps = list(invert(ours, "a cat", start, exact=False, steps=6, guidance_scale=3.0))
    assert [step.timestep for step in steps] == scheduler.timesteps.tolist()
    assert all(torch.equal(step.latents, one) for step, one in zip(steps, theirs, strict=True))


@pytest.mark.parametrize(
    "changes",
    ({}, {"prediction_type": "v_prediction"}, {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}),
    ids=str,
)
def test_any_ddim_step_is_undone(ours, changes):
    """Of a model of any prediction type, with any spacing, also part of the way."""
    scheduler = minisd.DDIMScheduler.from_config(ours.config.scheduler, **changes)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"steps": 7, "scheduler": scheduler, "guidance_scale": 2.0, "guidance_rescale": 0.3}
    *_, top = invert(ours, "a cat", x, start=3, **settings)
    *_, bottom = ours.denoise("a cat", latents=top.latents, start=3, **settings)
    assert (bottom.latents - x).norm() / x.norm() < 1e-4


def test_a_batch_is_solved_one_by_one(emoji, disc, side):
    prompts, discs = ["red circle", "sun"], [disc, draw_disc(side, "yellow")]
    settings = {"steps": 10, "guidance_scale": 2.0, "start": 8}
    *_, batch = invert(emoji, prompts, latents_of(emoji, *discs), **settings)
    for index, (prompt, picture) in enumerate(zip(prompts, discs, strict=True)):
        *_, alone = invert(emoji, prompt, latents_of(emoji, picture), **settings)
        # Solved to 1e-6, but of a step that hardly moves: where it came from shows in few digits.
        assert (batch.latents[index] - alone.latents[0]).abs().max() < 0.2


def test_the_solver_needs_acceleration():
    """x - D(x) grows here, so that plain iteration runs away; the accelerated one arrives."""
    matrix = torch.tensor([[3.0, 1.0], [-0.5, 2.5]])

    def step_down(x):
        return minisd.pipeline.Step(0, 1, (x.reshape(1, 2) @ matrix).reshape(1, 2, 1, 1), x)

    goal = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    found, _, miss = solve(step_down, goal)
    assert torch.allclose(step_down(found).latents, goal, atol=1e-4) and miss.abs().max() < 1e-4


def test_what_no_step_reaches_is_kept():
    """D(x) = x**2 + 2 never arrives at 1: even the best x misses by 1."""
    found, _, miss = solve(lambda x: minisd.pipeline.Step(0, 1, x**2 + 2, x), torch.ones(1, 1, 1, 1))
    assert torch.allclose(found**2 + 2 + miss, torch.ones(1)) and miss < -0.9


# ------------------------------------------------ editing


def test_an_edit_changes_the_colour_and_keeps_the_place(emoji, side):
    """A disc on the left becomes blue where it is; with its own words it stays red."""
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).ellipse([side * 0.04, side * 0.25, side * 0.54, side * 0.75], fill="#dd2e44")
    latents, settings = latents_of(emoji, picture), {"steps": 20, "guidance_scale": 3.0, "start": 10}
    for colour, strong, weak in (("blue", 2, 0), ("red", 0, 2)):
        new = f"{colour} circle on the left"
        (edited,) = finish(emoji, edit(emoji, "red circle on the left", new, latents, **settings))
        found = pixels(edited)[0]
        spot = found[side * 2 // 5 : side * 3 // 5, side // 5 : side * 2 // 5].mean(axis=(0, 1))
        corners = found[[2, 2, -3, -3], [2, -3, 2, -3]].mean(axis=0)
        assert spot[strong] > spot[weak] + 40, (colour, spot)
        disc = np.linalg.norm(found - spot, axis=-1) < np.linalg.norm(found - corners, axis=-1)
        assert np.nonzero(disc)[1].mean() < 0.4 * side, colour


# ------------------------------------------------ refusals and commands


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"scheduler": "ddpm"}, "inversion needs the ddim scheduler"),
        ({"eta": 0.5}, "inversion needs"),
        ({"start": 4}, "start=4: must be .* from 0 to 3"),
        ({"steps": 0}, "steps=0"),
        ({"prompt": ["a", "b"]}, "latents have the shape"),
    ),
    ids=str,
)
def test_impossible_settings(emoji, disc, settings, words):
    with pytest.raises(ValueError, match=words):
        list(invert(emoji, **{"prompt": "cat", "latents": latents_of(emoji, disc), "steps": 4, **settings}))


@pytest.mark.parametrize("plain", ([], ["--plain"]))
def test_the_command_invert(command, tiny_folder, plain):
    result = command("invert", "cat", "../disc.png", "-g", "1.1", "-o", "x.png", *plain, steps="2")
    words = result.stdout.splitlines()
    assert result.status == 0, result.stderr
    assert words[-2:] == ["x.safetensors", "x.png"] and "dB PSNR" in words[1] and result.stderr == ""
    sd = minisd.StableDiffusion.load(tiny_folder)
    latents = mean_latents(sd, to_images([draw_disc(64, "red")], 64, 64))
    *_, top = invert(sd, "cat", latents, steps=2, exact=not plain, guidance_scale=1.1)
    assert torch.allclose(load_file("x.safetensors")["latents"], top.latents, atol=1e-5)
    told = json.loads(
        command("invert", "cat", "../disc.png", "-g", "1.1", "-o", "x.png", "--json", *plain, steps="2").stdout
    )
    assert told["noise"] == "x.safetensors" and told["psnr"] > 0 and told["way"] == ("plain" if plain else "exact")


def test_the_command_edit(command, tiny_folder):
    result = command("edit", "cat", "red", "../disc.png", "-g", "1.1", "-o", "x.png", "--start", "2")
    assert (result.stdout, result.stderr) == ("x.png\n", "")
    sd = minisd.StableDiffusion.load(tiny_folder)
    latents = mean_latents(sd, to_images([draw_disc(64, "red")], 64, 64))
    expected = finish(sd, edit(sd, "cat", "red", latents, start=2, steps=4, guidance_scale=1.1))
    assert np.array_equal(pixels(Image.open("x.png")), pixels(*expected))
    assert "Start: 2" in Image.open("x.png").text["parameters"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["invert", "cat", "../text.png"], "text.png: is not a picture"),
        (["edit", "cat", "red", "../text.png"], "text.png: is not a picture"),
        (["edit", "cat", "red", "../disc.png", "--start", "4"], "start=4: must be .* from 0 to 3"),
        (["edit", "cat", "../disc.png"], "Missing argument 'PICTURE'"),
        (["invert", "cat", "../disc.png", "-o", "x.gif"], "must end in .png"),
    ),
)
def test_refusals(command, arguments, words):
    assert refused(command(*arguments), words)
