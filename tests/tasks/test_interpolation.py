"""Interpolation: the sphere, both ends, what lies between, and the command's files."""

import numpy as np
import pytest
import torch
from PIL import Image

from minisd.tasks import finish, interpolate, slerp
from tests.tasks.conftest import latents_of, middle, pixels, refused, seeded


def noise(seed: int, shape=(1, 4, 8, 8)) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def test_slerp_meets_both_ends_and_keeps_the_length():
    one, other = noise(1, (2, 4, 16, 16)), noise(2, (2, 4, 16, 16))
    assert torch.allclose(slerp(one, other, 0.0), one) and torch.allclose(slerp(one, other, 1.0), other)
    between = slerp(one, other, 0.5)
    assert between.std() == pytest.approx(1, abs=0.05)
    assert ((one + other) / 2).std() < 0.8  # the straight line has too little spread


def test_slerp_turns_at_constant_speed():
    one, other = torch.tensor([1.0, 0]).reshape(1, 2, 1, 1), torch.tensor([0, 1.0]).reshape(1, 2, 1, 1)
    found = slerp(one, other, 1 / 3).flatten()
    assert torch.allclose(found, torch.tensor([np.cos(np.pi / 6), np.sin(np.pi / 6)]).float())
    assert torch.allclose(slerp(one, one, 0.3), one)


def test_the_ends_are_the_pictures_of_the_two_seeds(emoji, side):
    shape = (1, 4, side // 8, side // 8)
    settings = {"steps": 4, "guidance_scale": 4.0}
    noises = noise(1, shape), noise(2, shape)
    frames = finish(emoji, interpolate(emoji, ("sun", "red heart"), noises, frames=3, **settings))
    for frame, prompt, seed in ((frames[0], "sun", 1), (frames[2], "red heart", 2)):
        (alone,) = emoji.text_to_image(prompt, seed=seed, **settings)
        assert abs(pixels(frame) - pixels(alone)).max() <= 1


def test_between_two_prompts_lies_what_is_between(emoji, side):
    """From a red heart to a blue one with one noise: the redness of the middle falls all the way."""
    one = noise(1, (1, 4, side // 8, side // 8))
    settings = {"frames": 4, "steps": 10, "guidance_scale": 3.0}
    frames = finish(emoji, interpolate(emoji, ("red heart", "blue heart"), (one, one), **settings))
    redness = [middle(frame)[0] - middle(frame)[2] for frame in frames]
    assert redness[0] > 40 and redness[-1] < -40 and redness == sorted(redness, reverse=True), redness


def test_several_walks_at_once(emoji, side):
    shape = (2, 4, side // 8, side // 8)
    ends = noise(1, shape), noise(2, shape)
    settings = {"frames": 2, "steps": 2, "guidance_scale": 4.0}
    *_, both = interpolate(emoji, (["sun", "tree"], ["red heart", "moon"]), ends, **settings)
    second = ends[0][1:], ends[1][1:]
    *_, alone = interpolate(emoji, ("tree", "moon"), second, **settings)
    assert (both.latents[2:] - alone.latents).abs().max() < 1e-4


def test_impossible_settings(emoji, disc):
    one = latents_of(emoji, disc)
    with pytest.raises(ValueError, match="frames=1: must be at least 2"):
        list(interpolate(emoji, ("a", "b"), (one, one), frames=1))
    with pytest.raises(ValueError, match=r"noises: .* must have one shape"):
        list(interpolate(emoji, ("a", "b"), (one, one[..., 1:]), frames=2))


def test_the_command(command):
    result = command("interpolate", "cat", "red", "-s", "1", "--to-seed", "5", "--frames", "3", "-o", "x.gif")
    assert result.stdout.splitlines() == ["x-1.png", "x-2.png", "x-3.png", "x.png", "x.gif"] and result.stderr == ""
    with Image.open("x.gif") as gif, Image.open("x.png") as strip:
        assert (gif.n_frames, gif.size, strip.size) == (3, (64, 64), (192, 64))
        assert "To prompt: red" in strip.text["parameters"] and "To seed: 5" in strip.text["parameters"]
        third = np.asarray(strip)[:, 128:]
    alone = command("generate", "red", "-s", "5", "-o", "y.png").written
    assert abs(third.astype(int) - pixels(Image.open(alone))).max() <= 1


def test_the_command_between_pictures(command):
    pictures = ["--pictures", "../disc.png", "../mask.png", "-g", "1.1", "--frames", "2"]
    result = command("interpolate", "cat", *pictures, "-o", "x.gif", steps="2")
    assert result.written.name == "x.gif" and result.stderr == ""
    assert not np.array_equal(pixels(Image.open("x-1.png")), pixels(Image.open("x-2.png")))


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["-o", "x.png"], "must end in .gif"),
        (["-o", "nowhere/x.gif"], "nowhere: there is no such folder"),
        (["-o", "../walk.gif"], "walk.gif: is a folder"),
        (["--frames", "1"], "'--frames'"),
        (["--pictures", "../disc.png", "../text.png"], "text.png: is not a picture"),
    ),
)
def test_refusals(command, arguments, words):
    assert refused(command("interpolate", "cat", *arguments, "-s", "1"), words)
