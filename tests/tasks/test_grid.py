"""Grids: every cell is the picture that its settings make alone."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minisd.metadata.reading import read_settings
from minisd.pixel.sheet import sheet
from minisd.sampling import Sampling
from minisd.tasks.grid import cells, labels
from tests.tasks.conftest import refused


def test_cells():
    found = cells(["a red cat", "red"], Sampling(seed=1), ("replace", ["red", "blue"]), ("steps", [2, 3]))
    assert [cell.prompt for cell in found][:4] == ["a red cat", "a blue cat"] * 2 and len(found) == 8
    assert [(cell.row, cell.column, cell.sampling.steps) for cell in found][:3] == [(0, 0, 2), (0, 1, 2), (1, 0, 3)]
    assert labels(("guidance_scale", [1.0, 7.5])) == ["guidance 1", "guidance 7.5"] and labels(("", [""])) == []
    assert labels(("", [""]), "cat") == ["cat"]
    with pytest.raises(ValueError, match="replace=dog: is not in the prompt 'cat'"):
        cells(["cat"], Sampling(), ("replace", ["dog", "x"]))
    with pytest.raises(ValueError, match="steps=0"):
        cells(["cat"], Sampling(), ("steps", [0]))


def test_a_sheet_has_room_for_its_names():
    pictures = [Image.new("RGB", (64, 64), "red")] * 6
    made = sheet(pictures, ["a", "a row with quite a long name"], ["x", "y", "z"])
    assert made.width > 3 * 64 + 150 and made.height > 128 and made.getpixel((made.width - 1, made.height - 1))[1] == 0


def test_each_cell_is_what_its_settings_make_alone(command):
    options = ("--x", "guidance=2,4", "--y", "scheduler=ddim,euler_a", "-s", "3", "-o", "x.png")
    result = command("grid", "cat", *options)
    assert result.status == 0, result.stderr
    assert result.stdout.splitlines() == ["x-1-1.png", "x-1-2.png", "x-2-1.png", "x-2-2.png", "x.csv", "x.png"]
    command("generate", "cat", "-s", "3", "-g", "4", "--scheduler", "euler_a", "-o", "alone.png")
    assert np.array_equal(np.asarray(Image.open("x-2-2.png")), np.asarray(Image.open("alone.png")))
    assert read_settings("x-2-2.png").settings["scheduler"] == "euler_a"
    rows = list(csv.DictReader(Path("x.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["file"] for row in rows] == result.stdout.splitlines()[:4]
    assert rows[3]["guidance_scale"] == "4.0" and rows[3]["scheduler"] == "euler_a" and rows[3]["prompt"] == "cat"
    told = json.loads(command("grid", "cat", "dog", *options[:2], "-o", "y.png", "--json").stdout)
    assert len(told["images"]) == 4 and Image.open("y.png").height > 128


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (["--x", "guidance"], "must be NAME=VALUE"),
        (["--x", "steps=2,many"], "takes numbers"),
        (["--x", "lora=0,1"], "the scale of --lora"),
        (["--x", "scheduler=none"], "scheduler='none'"),
        (["--y", "replace=dog,cow"], "is not in the prompt"),
        (["-o", "x.jpg"], "must end in .png"),
    ),
)
def test_bad_input(command, arguments, words):
    assert refused(command("grid", "cat", *arguments), words)
