"""Image to image: diffusers' numbers, what strength means, batches, and every refusal."""

import numpy as np
import pytest
import torch
from PIL import Image

import minisd
from minisd.tasks import finish, image_to_image, psnr, read_picture
from tests.ids import stable_id
from tests.tasks.conftest import draw_disc, middle, pixels, refused, seeded

# ------------------------------------------------ against diffusers

SETTINGS = {
    "plain": {},
    "strength 1": {"strength": 1.0},
    "strength that rounds down": {"strength": 0.29},
    "guidance 1": {"guidance_scale": 1.0},
    "eta": {"eta": 0.7, "negative_prompt": "ugly"},
}


@pytest.fixture(scope="module")
def theirs(twin):
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionImg2ImgPipeline

    from tests.tasks.reference import pipeline

    return pipeline(StableDiffusionImg2ImgPipeline, twin)


def same(mine, reference) -> bool:
    return np.array_equal(pixels(*mine), pixels(*reference))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_diffusers_pictures(theirs, ours, settings):
    picture = draw_disc(64, "red", "blue").resize((76, 67))  # sizes that the VAE cannot make
    reference = theirs("a cat", picture, num_inference_steps=7, generator=seeded(), **settings).images
    mine = finish(ours, image_to_image(ours, "a cat", picture, steps=7, seed=7, **settings))
    assert mine[0].size == (72, 64) and same(mine, reference)


def test_diffusers_batches(theirs, ours):
    """Two prompts, two pictures; one picture, three times; a generator for each."""
    pair = [draw_disc(64, "red"), draw_disc(64, "green")]
    settings = {"num_inference_steps": 3}
    reference = theirs(["a cat", "a dog"], pair, generator=seeded(), **settings).images
    assert same(finish(ours, image_to_image(ours, ["a cat", "a dog"], pair, steps=3, seed=7)), reference)
    reference = theirs("a cat", pair[0], num_images_per_prompt=3, generator=seeded(), **settings).images
    mine = finish(ours, image_to_image(ours, "a cat", pair[0], images_per_prompt=3, steps=3, seed=7))
    assert same(mine, reference)
    each = [[seeded(1), seeded(2)] for _ in range(2)]
    reference = theirs("a cat", pair[0], num_images_per_prompt=2, generator=each[0], **settings).images
    mine = finish(ours, image_to_image(ours, "a cat", pair[0], images_per_prompt=2, steps=3, generator=each[1]))
    assert same(mine, reference)


def test_diffusers_ddpm(twin, ours, theirs):
    from diffusers import DDPMScheduler, StableDiffusionImg2ImgPipeline

    from tests.tasks.reference import pipeline

    scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    ddpm = pipeline(StableDiffusionImg2ImgPipeline, twin, scheduler=scheduler)
    reference = ddpm("a cat", draw_disc(64, "red"), num_inference_steps=6, generator=seeded()).images
    steps = image_to_image(ours, "a cat", draw_disc(64, "red"), steps=6, seed=7, scheduler="ddpm")
    assert same(finish(ours, steps), reference)


# ------------------------------------------------ meaning, on the embedded model


@pytest.mark.parametrize("seeds", ((1, 2, 3, 4),))
def test_a_red_disc_becomes_blue_and_stays_where_it_was(emoji, disc, seeds):
    generators = [seeded(seed) for seed in seeds]
    settings = {"steps": 20, "guidance_scale": 4.0, "images_per_prompt": 4, "generator": generators}
    generated = finish(emoji, image_to_image(emoji, "blue circle", disc, strength=0.9, **settings))
    assert sum(middle(picture)[2] > middle(picture)[0] + 40 for picture in generated) >= 3
    corners = pixels(*generated)[:, [2, 2, -3, -3], [2, -3, 2, -3]].mean(axis=(1, 2))
    assert (corners > 200).sum() >= 3


def test_more_strength_leaves_less(emoji, disc):
    left = []
    for strength in (0.1, 0.4, 1.0):
        steps = image_to_image(emoji, "sun", disc, strength=strength, steps=10, seed=1, guidance_scale=1.0)
        (generated,) = finish(emoji, steps)
        left.append(psnr(generated, disc))
    assert left[0] > left[1] > left[2] and left[0] > 15


def test_the_steps_taken_are_the_last(emoji, disc):
    steps = list(image_to_image(emoji, "sun", disc, strength=0.4, steps=10, seed=1, guidance_scale=1.0))
    assert [step.index for step in steps] == [6, 7, 8, 9]
    assert [step.timestep for step in steps] == [301, 201, 101, 1]


def test_a_batch_generates_what_its_members_generate_alone(emoji, disc, side):
    other = draw_disc(side, "blue", "yellow")
    settings = {"steps": 4, "guidance_scale": 4.0}
    generators = [seeded(seed) for seed in range(4)]
    steps = image_to_image(
        emoji, ["sun", "red heart"], [disc, other], images_per_prompt=2, generator=generators, **settings
    )
    batch = finish(emoji, steps)
    for index, picture in enumerate(batch):
        prompt, source = [("sun", disc), ("red heart", other)][index // 2]
        (alone,) = finish(emoji, image_to_image(emoji, prompt, source, seed=index, **settings))
        assert abs(pixels(picture) - pixels(alone)).max() <= 1
    assert abs(pixels(batch[0]) - pixels(batch[1])).max() > 10


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"strength": 1.5}, "strength=1.5: must be from 0 to 1"),
        ({"strength": -0.1}, "strength=-0.1"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": 0.0}, "strength=0.0: is less than one of 4 steps"),
        ({"image": [Image.new("RGB", (64, 64))] * 2}, "image: 2 given"),
        ({"image": []}, "image: must be a PIL image"),
        ({"image": Image.new("RGB", (7, 64))}, "image: 7x64 pixels are too few"),
        ({"generator": [seeded(), seeded()]}, "generator: 2 given"),
        ({"height": 100}, "height=100"),
    ),
    ids=stable_id,
)
def test_impossible_settings(emoji, disc, settings, words):
    with pytest.raises(ValueError, match=words):
        list(image_to_image(emoji, "sun", **{"image": disc, "steps": 4, **settings}))


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"start": 4}, "start=4: must be .* from 0 to 3"),
        ({"start": -1}, "start=-1"),
        ({"start": 1}, "start=1: needs latents"),
        ({"prompt": torch.zeros(77, 8)}, "prompt has the shape"),
    ),
    ids=stable_id,
)
def test_impossible_starts(ours, settings, words):
    with pytest.raises(ValueError, match=words):
        list(ours.denoise(**{"prompt": "cat", "steps": 4, **settings}))


def test_context_in_the_place_of_prompts(ours):
    context, unwanted = (ours.encode_prompt([text], None) for text in ("cat", "dog"))
    *_, one = ours.denoise(context, negative_prompt=unwanted, steps=2, seed=1)
    *_, other = ours.denoise("cat", negative_prompt="dog", steps=2, seed=1)
    assert torch.equal(one.latents, other.latents)


# ------------------------------------------------ files


def test_what_is_transparent_becomes_white(tmp_path):
    picture = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    picture.putpixel((0, 0), (255, 0, 0, 255))
    picture.save(tmp_path / "x.png")
    found = read_picture(tmp_path / "x.png")
    assert found.getpixel((0, 0)) == (255, 0, 0) and found.getpixel((1, 1)) == (255, 255, 255)


def test_the_command(command, tiny_folder):
    result = command("img2img", "cat", "../disc.png", "-s", "3", "--strength", "0.5", "--images", "2", "-o", "x.png")
    assert result.stdout.splitlines() == ["x-1.png", "x-2.png", "x.png"] and result.stderr == ""
    sd = minisd.StableDiffusion.load(tiny_folder)
    steps = image_to_image(sd, "cat", read_picture("../disc.png"), strength=0.5, steps=4, seed=3)
    assert abs(pixels(Image.open("x-1.png")) - pixels(*finish(sd, steps))).max() <= 1
    assert "Strength: 0.5," in Image.open("x-1.png").text["parameters"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["../text.png"], "text.png: is not a picture"),
        (["../folder.png"], "folder.png: is not a picture"),
        (["nothing.png"], "nothing.png: no such file"),
        (["../disc.png", "--strength", "1.5"], "'--strength'.*1.5"),
        (["../disc.png", "--strength", "0.1"], "strength=0.1: is less than one of 4 steps"),
        (["../disc.png", "--size", "100"], "100.*multiple of 8"),
        (["../disc.png", "-o", "nowhere/x.png"], "nowhere: there is no such folder"),
    ),
)
def test_refusals(command, arguments, words):
    assert refused(command("img2img", "cat", *arguments, "-s", "1"), words)
