"""The small model that ships with minisd: complete, small, and it paints what it is asked for, without a network."""

import hashlib
import re
import subprocess
import sys

import numpy as np
import pytest

import minisd
from minisd.checkpoint.sources import embedded_model

FOLDER = embedded_model()


@pytest.fixture(scope="module")
def model():
    return minisd.StableDiffusion.load()


def test_it_is_small_and_complete(model):
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 32e6
    assert len(model.unet.state_dict()) == 686 and len(model.vae.state_dict()) == 248
    assert {"steps", "guidance_scale"} <= model.generation.keys()


def test_the_card_tells_the_sum_of_every_weight_file():
    sums = re.findall(r"^([0-9a-f]{64})  (\S+)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert len(sums) == 3
    for sha256, name in sums:
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == sha256


NO_NETWORK = """
import socket, sys
def refuse(*_): raise OSError("the network was touched")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse
sys.argv = ["minisd", "generate", "red heart", "--seed", "1", "--steps", "3", "--output", sys.argv[1], "--quiet"]
from minisd.cli import main
main()
"""


def test_it_paints_without_a_network(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(tmp_path / "heart.png")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'heart.png'}\n" and (tmp_path / "heart.png").stat().st_size > 0


def middle(picture) -> np.ndarray:
    """The mean colour of the middle of a picture, 0 to 255."""
    pixels = np.asarray(picture, dtype=float)
    height, width, _ = pixels.shape
    third = slice(height * 2 // 5, height * 3 // 5), slice(width * 2 // 5, width * 3 // 5)
    return pixels[third].mean(axis=(0, 1))


def corners(picture) -> np.ndarray:
    """The mean colour of the four corners."""
    pixels = np.asarray(picture, dtype=float)
    return pixels[[2, 2, -3, -3], [2, -3, 2, -3]].mean(axis=0)


def paint(model, prompt: str, seeds=(1, 2, 3, 4)) -> list:
    import torch

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return model.text_to_image(prompt, images_per_prompt=len(seeds), generator=generators, **model.generation)


@pytest.mark.parametrize(
    ("prompt", "strong", "weak"),
    (("red heart", [0], [1, 2]), ("tomato", [0], [2]), ("blue circle", [2], [0]), ("sun", [0, 1], [2])),
)
def test_things_have_their_colours(model, prompt, strong, weak):
    """In at least three of four pictures: a red heart is red in the middle, the sun yellow."""
    colours = [middle(picture) for picture in paint(model, prompt)]
    assert sum(colour[strong].min() > colour[weak].max() + 40 for colour in colours) >= 3, colours


def test_grounds_have_theirs(model):
    """White unless the prompt says otherwise, and then as it says."""
    white = [corners(picture) for picture in paint(model, "red heart")]
    blue = [corners(picture) for picture in paint(model, "a red heart on a blue background")]
    assert sum(colour.min() > 200 for colour in white) >= 3, white
    assert sum(colour[2] > colour[0] + 40 for colour in blue) >= 3, blue
