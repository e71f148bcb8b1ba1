"""The training scripts: a run is the same run in one process or two, and after an interruption."""

import gzip
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import fashion_data
import latent_bank
import pytest
import torch
from emoji_data import (
    EMOJI,
    FULL,
    GROUNDS,
    PLACES,
    RELATIONS,
    SIZE_WORDS,
    SIZES,
    TWO,
    Scene,
    caption,
    draw_scene,
    is_held_out,
    plural,
)
from fashion_data import as_input, read_fashion
from train_text_to_image import chosen_schedule
from training import Team

from minisd.pipeline import StableDiffusion

SCRIPTS = Path(__file__).parents[2] / "scripts"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def losses(start: list[str], kind: str, folder: Path, *numbers: int) -> dict[int, float]:
    """Run `run.py`; the loss of every step that its folder knows."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{SCRIPTS}{os.pathsep}{SCRIPTS.parent}", "OMP_NUM_THREADS": "1"}
    command = [*start, str(Path(__file__).with_name("run.py")), kind, str(folder), *map(str, numbers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in (folder / "losses.csv").read_text().splitlines()]
    return {int(step): float(loss) for step, loss in rows}


@pytest.fixture(scope="module", params=["text", "v", "vae", "classes"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def curve(kind, tmp_path_factory):
    """The losses of six steps in one process, without a break."""
    return losses([sys.executable], kind, tmp_path_factory.mktemp(kind), 6)


def test_two_processes_have_the_curve_of_one(kind, curve, tmp_path):
    """Each of two gloo processes takes half of the batch: the same losses, but for bfloat16's rounding."""
    assert losses(TORCHRUN, kind, tmp_path, 6) == pytest.approx(curve, rel=2e-3)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(kind, curve, tmp_path):
    assert len(losses([sys.executable], kind, tmp_path, 6, 3)) == 3
    assert losses([sys.executable], kind, tmp_path, 6) == curve


def test_a_model_of_v_is_saved_with_its_schedule(tmp_path):
    """As the training script saves it: loaded, it samples by v, from pure noise."""
    emoji = StableDiffusion.load("emoji")
    parts = emoji.text_encoder, emoji.unet, emoji.vae, emoji.tokenizer
    StableDiffusion(*parts, scheduler=chosen_schedule("v_prediction", True)).save(tmp_path / "v")
    scheduler = StableDiffusion.load(tmp_path / "v").make_scheduler(None, 10)
    assert scheduler.prediction_type == "v_prediction" and scheduler.alphas_cumprod[-1] == 0
    assert scheduler.timesteps[0] == 999
    with pytest.raises(ValueError, match="needs --prediction v_prediction"):
        chosen_schedule("epsilon", True)


def test_fashion_files(tmp_path):
    """IDX files are read, padded to 32 x 32, and what is broken is refused by name."""
    images = struct.pack(">4B3I", 0, 0, 8, 3, 2, 28, 28) + bytes(range(256)) * 6 + bytes(32)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">4BI2B", 0, 0, 8, 1, 2, 7, 9)))
    pictures, labels = read_fashion(tmp_path, "train")
    assert pictures.shape == (2, 1, 32, 32) and labels.tolist() == [7, 9]
    assert pictures[0, 0, 2, 2:6].tolist() == [0, 1, 2, 3] and pictures[0, 0, :2].sum() == 0
    assert as_input(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    (tmp_path / "train-images-idx3-ubyte").write_bytes(images[:-1])
    with pytest.raises(ValueError, match="is no whole IDX file"):
        read_fashion(tmp_path, "train")
    with pytest.raises(ValueError, match=r"has no t10k-images-idx3-ubyte\.gz"):
        read_fashion(tmp_path, "t10k")


def test_scenes_are_a_function_of_seed_and_number():
    assert draw_scene(3, 5, FULL) == draw_scene(3, 5, FULL) != draw_scene(3, 6, FULL)


def test_captions_say_what_is_seen():
    """Everything that differs from one thing, of ordinary size, in the middle of white, is in the caption."""
    for index in range(1000):
        scene = draw_scene(0, index, FULL)
        words = caption(scene, random.Random(index))
        for figure in scene.figures:
            assert any(name in words or plural(name) in words for name in EMOJI[figure.character]), words
            assert any(size in words for size in SIZE_WORDS[figure.size]), words
        assert scene.place in words and scene.relation in words
        assert scene.ground == "white" or re.search(rf"\b(on|with an?) .*{scene.ground}\b", words), words
        if scene.relation:
            wanted = [PLACES[place] for place in RELATIONS["and" if scene.relation == TWO else scene.relation]]
            assert all(
                abs(figure.x - x) + abs(figure.y - y) < 0.1
                for figure, (x, y) in zip(scene.figures, wanted, strict=True)
            )


def test_some_combinations_are_kept_from_training():
    held_out = [combination for combination in product(EMOJI, GROUNDS, PLACES) if is_held_out(*combination)]
    assert 200 < len(held_out) < 600
    seen = {(scene.figures[0].character, scene.ground, scene.place) for scene in scenes(20_000) if not scene.relation}
    assert len(seen) > 3000 and not seen & set(held_out)


def scenes(count: int) -> Iterator[Scene]:
    return (draw_scene(1, index, FULL) for index in range(count))


def test_the_vocabulary_of_scenes():
    assert len(EMOJI) >= 200 and len(GROUNDS) == 9 and len(PLACES) == 5 and len(SIZES) == 3
    names = [name for names in EMOJI.values() for name in names]
    assert len(names) == len(set(names)), "a name that means two things cannot be learnt"


def sampled(folder: Path, prompts: str, *options: str) -> Path:
    """A folder that `minisd sample` made, one step a picture."""
    folder.mkdir()
    (folder / "prompts.txt").write_text(prompts)
    command = [sys.executable, "-m", "minisd", "sample", str(folder / "prompts.txt"), str(folder / "out")]
    subprocess.run([*command, "--steps", "1", "--quiet", *options], check=True, capture_output=True)
    return folder / "out"


def test_training_reads_what_sample_made(tmp_path):
    """Text to image: the prompts are the captions, and the latents those of the pictures."""
    folder = sampled(tmp_path / "emoji", "red heart\na cat\n", "--size", "64")
    samples, vae = latent_bank.read_shards(folder), StableDiffusion.load().vae
    assert [sample.text for sample in samples] == ["red heart", "a cat"]
    team = Team(0, 1, torch.device("cpu"))
    bank = latent_bank.open_bank(tmp_path / "bank.pt", vae, team, samples, latent_bank.Shards)
    assert bank.mean.shape == (2, 4, 16, 16) and latent_bank.said(bank.scenes[1], random.Random(0)) == "a cat"
    again = latent_bank.open_bank(tmp_path / "bank.pt", vae, team, samples, NotImplemented)
    assert torch.equal(again.mean, bank.mean)


def test_class_conditional_training_reads_what_sample_made(tmp_path):
    folder = sampled(tmp_path / "fashion", "bag\nsandal\nbag\n", "--model", "fashion")
    pictures, labels = fashion_data.read_shards(folder)
    assert pictures.shape == (3, 1, 32, 32) and pictures.dtype == torch.uint8 and labels.tolist() == [8, 5, 8]
    assert len({picture.numpy().tobytes() for picture in pictures}) == 3
    with pytest.raises(ValueError, match="'red heart' is none of T-shirt"):
        fashion_data.read_shards(sampled(tmp_path / "emoji", "red heart\n", "--size", "64"))
