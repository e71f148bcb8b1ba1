"""What the tests of the tasks share: the embedded model, drawn pictures, and the command run in this process."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import minisd
import minisd.cli
from minisd.tasks import mean_latents, to_images
from tests.command import Result
from tests.unit.tiny import tiny_model


@pytest.fixture(scope="session")
def emoji() -> minisd.StableDiffusion:
    """The model that comes with minisd."""
    return minisd.StableDiffusion.load()


@pytest.fixture(scope="session")
def side(emoji) -> int:
    """Its pictures' height and width, in pixels."""
    return emoji.unet.config.sample_size * emoji.vae.config.downsampling


@pytest.fixture(scope="session")
def disc(side) -> Image.Image:
    """A red disc on white, of the embedded model's size."""
    return draw_disc(side, "#dd2e44")


def draw_disc(side: int, colour: str, ground: str = "white") -> Image.Image:
    picture = Image.new("RGB", (side, side), ground)
    ImageDraw.Draw(picture).ellipse([side * 0.15, side * 0.15, side * 0.85, side * 0.85], fill=colour)
    return picture


def latents_of(sd, *pictures) -> torch.Tensor:
    return mean_latents(sd, to_images(pictures, pictures[0].height, pictures[0].width))


def pixels(*pictures) -> np.ndarray:
    """Pictures -> (n, H, W, 3), as signed numbers."""
    return np.stack([np.asarray(picture).astype(int) for picture in pictures])


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def middle(picture) -> np.ndarray:
    """The mean colour of the middle fifth."""
    found = pixels(picture)[0]
    height, width, _ = found.shape
    return found[height * 2 // 5 : height * 3 // 5, width * 2 // 5 : width * 3 // 5].mean(axis=(0, 1))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A whole model of 64 pixels and a few hundred kB, on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save(folder)
    return folder


@pytest.fixture
def command(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run `minisd` with the tiny model, in an empty folder; pictures and masks lie in the folder above."""
    output = tmp_path / "output"
    output.mkdir()
    monkeypatch.chdir(output)
    draw_disc(64, "red").save(tmp_path / "disc.png")
    draw_disc(64, "white", "black").save(tmp_path / "mask.png")
    draw_disc(32, "white", "black").save(tmp_path / "small.png")
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "walk.gif").mkdir()

    def run(name: str, *arguments: str, steps: str | None = "4") -> Result:
        options = ["--model", str(tiny_folder), *(["--steps", steps] if steps else [])]
        monkeypatch.setattr(sys, "argv", ["minisd", name, *arguments, *options])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            minisd.cli.main()
        return Result(caught.value.code, *capsys.readouterr())

    return run


def refused(result: Result, words: str) -> bool:
    """One line on standard error that says why, status 2, and nothing written."""
    import re

    assert (result.status, result.stdout) == (2, ""), result.stderr
    assert re.fullmatch(f"error: .*{words}.*\n", result.stderr), result.stderr
    assert list(Path().iterdir()) == []
    return True
