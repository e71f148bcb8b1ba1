"""The training scripts: a run is the same run in one process or two, and after an interruption."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from emoji_data import EMOJI, FULL, GROUNDS, PLACES, SIZES, caption, draw_scene

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


@pytest.fixture(scope="module", params=["text", "vae"])
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
