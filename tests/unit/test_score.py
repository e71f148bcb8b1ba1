"""`minisd score`: torchmetrics' numbers, and what is told beside them. `minisd sample` on a model of pixels."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import minisd.cli
from minisd.batch import features
from minisd.batch.score import Pictures
from tests.command import Result

pytest.importorskip("webdataset")
pytest.importorskip("torchmetrics")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["minisd", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            minisd.cli.main()
        return Result(caught.value.code, *capsys.readouterr())

    return run


def sample(run, out: str, *more: str) -> None:
    given = "--model fashion --per-prompt 4 --batch 8 --steps 2 --guidance 1 --threads 1 -q".split()
    with open("prompts.txt", "w") as file:
        file.write("bag\nankle boot\n")
    assert not run("sample", "prompts.txt", out, *given, *more).status


def test_a_grid_is_scored(run, tmp_path):
    pytest.importorskip("matplotlib")
    sample(run, "grid", "--grid", "steps=1,2", "eta=0,0.5")
    sample(run, "other", "--seed", "100")
    metrics = [text for name in ("fid", "kid", "psnr", "ssim", "recognised") for text in ("--metric", name)]
    result = run("score", "grid", "--reference", "other", "--features", "fashion", *metrics, "--json")
    assert not result.status and "take more pictures" in result.stderr
    told = json.loads(result.stdout)
    assert [(row["steps"], row["eta"], row["n"]) for row in told["rows"]] == [
        (1, 0, 8),
        (1, 0.5, 8),
        (2, 0, 8),
        (2, 0.5, 8),
    ]
    assert told["seeds"] == "0 to 7" and "1536" in told["features"] and "torchmetrics" in told["versions"]
    assert all(row["fid"] > 0 and 0 <= row["recognised"] <= 1 and row["psnr"] < 40 for row in told["rows"])
    assert {path.name for path in (tmp_path / "grid").glob("scores.*")} == {
        f"scores.{end}" for end in ("csv", "json", "md", "png")
    }


def test_the_same_pictures_are_equal(run):
    sample(run, "one")
    result = run(
        "score", "one", "--reference", "one", "--features", "emoji", "--metric", "kid", "--metric", "ssim", "--json"
    )
    (row,) = json.loads(result.stdout)["rows"]
    assert row["ssim"] == 1 and abs(row["kid"]) < 4 * row["kid_std"] + 1e-3


@pytest.mark.parametrize("kind", [features.FashionFeatures, features.EmojiFeatures])
def test_features_have_the_size_that_they_say(kind):
    with torch.no_grad():
        found = kind()(torch.randint(0, 255, (2, 3, 40, 40), dtype=torch.uint8))
    assert found.shape == (2, kind.num_features) and found.std() > 0


def test_folders_of_pictures(tmp_path):
    for number in (2, 1):
        Image.fromarray(np.full((4, 6), number, np.uint8)).save(tmp_path / f"{number}.png")
    pictures = [picture for picture, _ in Pictures(tmp_path)]
    assert [picture[0, 0, 0].item() for picture in pictures] == [1, 2] and pictures[0].shape == (3, 4, 6)
    Image.new("L", (9, 9)).save(tmp_path / "3.png")
    with pytest.raises(ValueError, match="several sizes"):
        list(Pictures(tmp_path).batches())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "has no sample.json"),
        (["one", "--reference", "nowhere"], "no such folder"),
        (["one", "--metric", "psnr"], "psnr: need a --reference"),
        (["one", "--reference", "empty", "--features", "fashion"], "empty: has 0 pictures, too few"),
        (["one", "--reference", "empty", "--metric", "ssim"], "do not pair up"),
    ],
)
def test_what_cannot_be_scored(run, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    sample(run, "one")
    result = run("score", *arguments)
    assert result.status == 2 and words in result.stderr and result.stderr.count("\n") == 1


def test_models_of_pixels_know_classes_and_one_size(run):
    with open("p.csv", "w") as file:
        file.write("prompt,size\nbag,32\nhat,32\n")
    result = run("sample", "p.csv", "out", "--model", "fashion", "-q")
    assert result.status == 2 and "line 3: 'hat' is no class of this model, which has T-shirt" in result.stderr
    with open("p.csv", "w") as file:
        file.write("prompt,size\nbag,64\n")
    assert (
        "line 2: height=64, width=64: this model of pixels makes 32x32"
        in run("sample", "p.csv", "out", "--model", "fashion").stderr
    )


@pytest.mark.parametrize(("module", "metric"), [("kid", "kid"), ("lpip", "lpips")])
def test_networks_that_are_not_installed(run, monkeypatch, module, metric):
    sample(run, "one")
    name = "_TORCH_FIDELITY_AVAILABLE" if metric == "kid" else "_TORCHVISION_AVAILABLE"
    monkeypatch.setattr(f"torchmetrics.image.{module}.{name}", False, raising=False)
    monkeypatch.setattr(f"torchmetrics.functional.image.lpips.{name}", False, raising=False)
    result = run("score", "one", "--reference", "one", "--metric", metric)
    assert result.status == 2 and "minisd[score]" in result.stderr
    assert "fetched at the first use" in result.stderr  # with its size, before it is
