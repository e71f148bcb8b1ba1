"""Inpainting: diffusers' numbers with 4 channels and 9, what survives outside the mask, batches, and every refusal."""

import numpy as np
import pytest
import torch
from PIL import Image

import minisd
from minisd.tasks import finish, inpaint, psnr, read_picture
from minisd.tasks.inpainting import to_mask
from tests.ids import stable_id
from tests.tasks.conftest import draw_disc, middle, pixels, refused, seeded
from tests.unit.tiny import tiny_model


def same(mine, reference) -> bool:
    return np.array_equal(pixels(*mine), pixels(*reference))


# ------------------------------------------------ against diffusers

SETTINGS = {
    "plain": {},
    "strength": {"strength": 0.6, "guidance_scale": 3.0},
    "guidance 1": {"guidance_scale": 1.0},
    "eta": {"eta": 0.7, "negative_prompt": "ugly"},  # its noise tells whether as much was drawn before
    "three": {"strength": 0.7, "pictures": 3},
}


@pytest.fixture(scope="module")
def inpainters(twin, ours, tmp_path_factory):
    """diffusers' inpainting pipeline and ours, for each kind of checkpoint: {4: (theirs, ours), 9: (theirs, ours)}."""
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionInpaintPipeline

    from tests.parity.reference import NARROW, reference_unet
    from tests.tasks.reference import pipeline

    torch.manual_seed(1)
    unet = reference_unet(NARROW["unet"], NARROW["text"], in_channels=9)
    nine = pipeline(StableDiffusionInpaintPipeline, twin, unet=unet)
    folder = tmp_path_factory.mktemp("inpainting")
    nine.save_pretrained(folder)
    four = pipeline(StableDiffusionInpaintPipeline, twin)
    return {4: (four, ours), 9: (type(nine).from_pretrained(folder), minisd.StableDiffusion.load(folder))}


@pytest.mark.parametrize("channels", (4, 9))
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_diffusers_pictures(inpainters, channels, settings):
    theirs, ours = inpainters[channels]
    settings = dict(settings)
    count = settings.pop("pictures", 1)
    picture, mask = draw_disc(64, "red", "blue"), draw_disc(64, "white", "black")
    reference = theirs(
        "a cat",
        picture,
        mask,
        height=64,
        width=64,
        num_inference_steps=5,
        num_images_per_prompt=count,
        generator=seeded(),
        **settings,
    ).images
    settings |= {"images_per_prompt": count, "keep_outside": False, "mask_grid": "nearest"}
    mine = finish(ours, inpaint(ours, "a cat", picture, mask, steps=5, seed=7, **settings))
    assert same(mine, reference)


def test_diffusers_masks(inpainters):
    """Grey masks in odd sizes: resized, then cut at half brightness, then thinned to the size of the latents."""
    theirs, _ = inpainters[4]
    mask = Image.radial_gradient("L").resize((83, 61))
    reference = theirs.mask_processor.preprocess(mask, height=56, width=80)
    assert torch.equal(to_mask([mask], [mask], 56, 80), reference) and 0.1 < reference.mean() < 0.9


# ------------------------------------------------ meaning, on the embedded model


@pytest.fixture(scope="module")
def hole(side):
    """White where to generate: all but a rim of one latent."""
    mask = Image.new("L", (side, side), 0)
    mask.paste(255, (8, 8, side - 8, side - 8))
    return mask


def rim(picture) -> np.ndarray:
    """The outer half of the rim, in a row."""
    found = pixels(picture)[0]
    return np.concatenate([found[:4].reshape(-1, 3), found[-4:].reshape(-1, 3)])


def test_the_hole_is_generated_and_the_rest_survives(emoji, disc, hole, side):
    small = Image.new("RGB", disc.size, "white")
    small.paste(disc.resize((side * 5 // 8, side * 5 // 8)), (side * 3 // 16, side * 3 // 16))
    settings = {"steps": 20, "guidance_scale": 4.0, "images_per_prompt": 4}
    generators = [seeded(seed) for seed in (1, 2, 3, 4)]
    generated = finish(emoji, inpaint(emoji, "sun", small, hole, generator=generators, keep_outside=False, **settings))
    assert middle(small)[1] < 60
    assert sum(middle(picture)[[0, 1]].min() > 100 for picture in generated) >= 3, [middle(p) for p in generated]
    lost = [abs(rim(picture) - rim(small)).mean() for picture in generated]  # by the VAE, which sees all at once
    assert max(lost) < 8, lost


def test_the_latents_outside_are_the_pictures_own(emoji, disc, hole, side):
    """Measured without the VAE: exactly those that were encoded, whatever the prompt."""
    ends = []
    for prompt in ("sun", "blue circle"):
        *_, last = inpaint(emoji, prompt, disc, hole, steps=3, seed=1, guidance_scale=4.0)
        ends.append(last.latents)
    known = to_mask([hole], [disc], side, side)[:, :, 4::8, 4::8][0, 0] == 0
    corner = torch.zeros_like(known)
    corner[0] = corner[-1] = True
    assert (known & corner).sum() == corner.sum()
    assert torch.equal(ends[0][..., corner], ends[1][..., corner]) and not torch.equal(*ends)


def test_an_empty_mask_changes_nothing(emoji, disc):
    from minisd.pipeline import to_pictures
    from minisd.tasks import encode_pictures, to_images

    nothing = Image.new("L", disc.size, 0)
    (generated,) = finish(emoji, inpaint(emoji, "sun", disc, nothing, steps=3, seed=1))
    assert same([generated], [disc])
    (generated,) = finish(emoji, inpaint(emoji, "sun", disc, nothing, steps=3, seed=1, keep_outside=False))
    latents = encode_pictures(emoji, to_images([disc], disc.height, disc.width), 1, seeded(1))
    with torch.no_grad():
        assert psnr(generated, to_pictures(emoji.decode(latents))[0]) > 45


def test_a_batch_generates_what_its_members_generate_alone(emoji, disc, hole, side):
    other, half = draw_disc(side, "blue", "yellow"), hole.crop((0, 0, side // 2, side)).resize(hole.size)
    settings = {"steps": 3, "guidance_scale": 4.0, "eta": 0.5, "strength": 0.7}
    sources = [("sun", disc, hole), ("red heart", other, half)]
    prompts, pictures, masks = (list(column) for column in zip(*sources, strict=True))
    generators = [seeded(seed) for seed in range(4)]
    batch = finish(
        emoji, inpaint(emoji, prompts, pictures, masks, images_per_prompt=2, generator=generators, **settings)
    )
    for index, picture in enumerate(batch):
        (alone,) = finish(emoji, inpaint(emoji, *sources[index // 2], seed=index, **settings))
        assert abs(pixels(picture) - pixels(alone)).max() <= 1
    assert abs(pixels(batch[0]) - pixels(batch[1])).max() > 10


@pytest.mark.parametrize("size", [(56, 72), (60, 75)])
def test_every_pixel_outside_the_mask_is_the_pictures_own(ours, size):
    """Whatever the size, for every copy; inside it is another picture, also under a stroke of two pixels."""
    picture, mask = draw_disc(80, "red", "blue").resize(size), Image.new("L", size, 0)
    mask.paste(255, (20, 10, 22, 50))
    mask.paste(255, (35, 10, 50, 40))
    steps = inpaint(ours, "a cat", picture, mask, steps=2, seed=1, images_per_prompt=2, height=56, width=72)
    resized = pixels(picture.resize((72, 56), Image.Resampling.LANCZOS))[0]
    open_ = to_mask([mask], [mask], 56, 72)[0, 0].bool().numpy()
    for generated in finish(ours, steps):
        change = abs(pixels(generated)[0] - resized).max(-1)
        assert not change[~open_].any() and (change[open_] > 0).mean() > 0.9
        assert change[:, :30][open_[:, :30]].mean() > 20


def test_any_masked_pixel_opens_its_latent():
    from minisd.tasks.inpainting import on_grid

    mask = torch.zeros(1, 1, 32, 40)
    mask[..., 15, 23] = 1
    assert on_grid(mask, (4, 5), "any").nonzero().tolist() == [[0, 0, 1, 2]]
    assert not on_grid(mask, (4, 5), "nearest").any()
    with pytest.raises(ValueError, match="mask_grid='some'"):
        on_grid(mask, (4, 5), "some")


def test_the_seam_is_soft():
    from minisd.tasks.inpainting import soft

    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 12:] = 1
    row = soft(mask)[0, 0, 16]
    assert not row[:12].any() and (row[12:17].diff() > 0.05).all() and (row[17:] == 1).all()
    mask[..., 13:] = 0  # a stroke of one pixel is not faint
    assert soft(mask)[0, 0, 16, 12] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"mask": Image.new("L", (8, 8))}, "mask: has 8x8 pixels, and the picture"),
        ({"mask": []}, "must be a PIL image"),
        ({"mask": "two"}, "mask: 2 given for 1 pictures"),
        ({"strength": 2.0}, "strength=2.0"),
    ),
    ids=stable_id,
)
def test_impossible_settings(emoji, disc, hole, settings, words):
    settings = {"mask": hole, **settings}
    if settings["mask"] == "two":
        settings["mask"] = [hole, hole]
    with pytest.raises(ValueError, match=words):
        list(inpaint(emoji, "sun", disc, steps=4, **settings))


def test_other_checkpoints_are_refused():
    with pytest.raises(ValueError, match="takes 8 channels: inpainting needs 4, or the 9"):
        list(inpaint(tiny_model(in_channels=8), "cat", draw_disc(64, "red"), draw_disc(64, "white"), steps=1))
    with pytest.raises(ValueError, match="takes 9 channels, not 4"):
        tiny_model(in_channels=9).text_to_image("cat", steps=1)


# ------------------------------------------------ the command


def test_the_command(command, tiny_folder):
    result = command("inpaint", "cat", "../disc.png", "../mask.png", "-s", "3", "-o", "x.png")
    assert (result.stdout, result.stderr) == ("x.png\n", "")
    sd = minisd.StableDiffusion.load(tiny_folder)
    steps = inpaint(sd, "cat", read_picture("../disc.png"), read_picture("../mask.png"), steps=4, seed=3)
    assert same([Image.open(result.written)], finish(sd, steps))


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["../disc.png", "../small.png"], "mask: has 32x32 pixels, and the picture 64x64"),
        (["../disc.png", "../text.png"], "text.png: is not a picture"),
        (["../text.png", "../mask.png"], "text.png: is not a picture"),
        (["../disc.png", "nothing.png"], "nothing.png: no such file"),
        (["../disc.png"], "Missing argument 'MASK'"),
        (["../disc.png", "../mask.png", "--strength", "-1"], "'--strength'"),
    ),
)
def test_refusals(command, arguments, words):
    assert refused(command("inpaint", "cat", *arguments, "-s", "1"), words)
