"""The experiments on the page of `minisd/lab/weights/`, run as they stand there."""

import numpy as np
import pytest
import torch
from page import run_section

from minisd import StableDiffusion


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All that the page's code makes, and the pictures of an untouched model."""
    names = run_section("minisd/lab/weights/README.md", "Surgery", tmp_path_factory.mktemp("surgery"))
    sd = StableDiffusion.load("emoji")
    for word, prompt in (("cat", "cat face"), ("heart", "red heart")):
        names[word] = sd.text_to_image(prompt, steps=20, guidance_scale=4.0, seed=4)[0]
    return names


def forehead(picture):
    """The mean of red, green and blue, above the eyes."""
    return np.asarray(picture, dtype=float)[48:58, 54:74].mean(axis=(0, 1))


def test_looking(found):
    assert tuple(found["q"].shape) == (96, 96) and found["q"].dtype == torch.float16


def test_a_silent_head_turns_the_cat_orange(found):
    yellow, orange = forehead(found["cat"]), forehead(found["silent"])
    assert yellow[0] > 200 and orange[0] > 200 and yellow[1] - orange[1] > 20


def test_swapped_blocks_lose_the_colours(found):
    assert np.abs(np.asarray(found["swapped"], float) - np.asarray(found["heart"], float)).mean() > 40


def test_a_rounded_vae_generates_nearly_the_same(found):
    difference = np.abs(np.asarray(found["rounded"], float) - np.asarray(found["heart"], float))
    assert 0 < difference.mean() < 5
    assert torch.equal(found["grafted"].unet.conv_in.weight, StableDiffusion.load("emoji").unet.conv_in.weight)
