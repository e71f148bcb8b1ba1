"""The small model that ships with minisd: complete, small, and it generates what it is asked for, without a network."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emoji_data import EMOJI, GROUNDS, vocabulary
from recognition import Gallery, centre, nearest_ground

import minisd
from minisd.checkpoint.hub import embedded_model

FOLDER = embedded_model()
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def model():
    return minisd.StableDiffusion.load()


def test_it_is_small_and_complete(model):
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 32e6
    assert len(model.unet.state_dict()) == 686 and len(model.vae.state_dict()) == 248
    assert {"steps", "guidance_scale"} <= model.generation.keys()


def test_it_says_which_words_it_was_trained_on():
    assert (FOLDER / "words.txt").read_text().splitlines() == list(vocabulary())


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


def test_it_generates_without_a_network(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(tmp_path / "heart.png")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'heart.png'}\n" and (tmp_path / "heart.png").stat().st_size > 0


THINGS = "❤ 🔵 🟩 ☀ 🍅 🍌 🍕 🏠 🎈 🚗 🐼 ⭐".split()


def generate(model, prompts: list[str]) -> list:
    """A picture of each prompt, from seeds that no training saw."""
    generators = [torch.Generator().manual_seed(2_000_000 + number) for number in range(len(prompts))]
    return model.text_to_image(prompts, generator=generators, **model.generation)


def test_things_are_recognised(model):
    """A small sample of what `scripts/evaluate_emoji.py` measures: plain names, found again among all emoji."""
    gallery = Gallery.read(DATA / "emoji.png")
    rankings = [gallery.ranking(picture) for picture in generate(model, [EMOJI[thing][0] for thing in THINGS])]
    places = {EMOJI[thing][0]: ranking.index(thing) for thing, ranking in zip(THINGS, rankings, strict=True)}
    assert sum(place == 0 for place in places.values()) >= 8, places
    assert sum(place < 5 for place in places.values()) >= 10, places


def test_grounds_are_as_asked(model):
    """White unless the prompt says otherwise, and then as it says."""
    prompts = ["red heart", *(f"a red heart on a {ground} background" for ground in list(GROUNDS)[1:])]
    found = [nearest_ground(picture) for picture in generate(model, prompts)]
    assert sum(one == other for one, other in zip(found, GROUNDS, strict=True)) >= 8, found


def test_words_move_the_picture(model):
    """The same noise with "on the left" and "on the right": the figure goes where the words say."""
    left, right = (
        model.text_to_image(f"red heart {place}", seed=2_000_000, **model.generation)[0]
        for place in ("on the left", "on the right")
    )
    assert centre(left)[0] < 0.4 < 0.6 < centre(right)[0]
