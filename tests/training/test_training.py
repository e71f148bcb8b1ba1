"""The training scripts: a run is the same run in one process or two, and after an interruption."""

import gzip
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emoji_data import EMOJI, FULL, GROUNDS, PLACES, SIZES, caption, draw_scene
from fashion_data import as_input, read_fashion
from train_text_to_image import chosen_schedule

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
    for index in range(500):
        scene = draw_scene(0, index, FULL)
        words = caption(scene, random.Random(index))
        assert all(any(name in words for name in EMOJI[figure.character]) for figure in scene.figures), words
        assert scene.size in words and scene.place in words
        assert scene.ground == "white" or f"{scene.ground}" in words.rpartition(" on ")[2]
        if len(scene.figures) == 2:
            left, right = scene.figures
            assert left.x < right.x and " and " in words


def test_the_vocabulary_of_scenes():
    assert len(EMOJI) >= 200 and len(GROUNDS) == 9 and len(PLACES) == 5 and len(SIZES) == 3
    names = [name for names in EMOJI.values() for name in names]
    assert len(names) == len(set(names)), "a name that means two things cannot be learnt"
