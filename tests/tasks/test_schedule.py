"""`minisd schedule`: the numbers are the scheduler's, and the drawing shows them."""

import json

import numpy as np
import pytest
from PIL import Image

import minisd
from minisd.tasks import schedule
from tests.tasks.conftest import refused


@pytest.fixture(scope="module")
def ddim():
    return minisd.DDIMScheduler.from_config(minisd.SD15.scheduler)


def test_the_numbers(ddim):
    snr = schedule.snr_decibel(ddim.alphas_cumprod)
    assert snr[0].item() == pytest.approx(30.7, abs=0.1) and snr[-1].item() == pytest.approx(-23.3, abs=0.1)
    zero = minisd.DDIMScheduler.from_config(ddim.config, rescale_betas_zero_snr=True)
    assert schedule.snr_decibel(zero.alphas_cumprod)[-1] == schedule.LOWEST


def test_three_spacings(ddim):
    found = schedule.visited(ddim, 5)
    assert found == {
        "leading": [801, 601, 401, 201, 1],
        "trailing": [999, 799, 599, 399, 199],
        "linspace": [999, 749, 500, 250, 0],
    }


def test_the_text_shows_them(ddim):
    lines = schedule.as_text(ddim, 5, width=50).splitlines()
    first, last = lines[1], lines[12]
    assert lines[0] == "alpha_bar over timesteps 0 to 999" and first.split()[0] == "1.00" and first.rstrip()[-1] == "*"
    assert last.rstrip().endswith("*") and len(last.rstrip()) == 9 + 50  # falls from the left top to the right bottom
    ticks = [line for line in lines if "|" in line]
    assert [line.count("|") for line in ticks] == [5, 5, 5]
    assert [line.split("...")[0].split()[-1] for line in ticks] == ["801", "999", "999"]
    assert ["*" in line for line in ticks] == [True, False, False]


def test_the_picture_shows_them(ddim):
    """The curve falls: its highest blue pixel stands on the left, its lowest on the right."""
    found = np.asarray(schedule.as_picture(ddim, 10)).astype(int)
    blue = (abs(found - [0x20, 0x60, 0xC0]).max(axis=-1) < 10)[30:231]
    columns = [np.flatnonzero(blue[:, x]).mean() for x in (100, 300, 500, 700, 900) if blue[:, x].any()]
    assert len(columns) >= 4 and columns == sorted(columns)
    other = schedule.as_picture(minisd.DDIMScheduler.from_config(ddim.config, beta_end=0.02), 10)
    assert not np.array_equal(found, np.asarray(other))


def test_the_command(command):
    result = command("schedule", steps="5")
    assert result.status == 0 and result.stderr == "" and "801 ... 1" in result.stdout
    other = command("schedule", "--set", "timestep_spacing=trailing", "--set", "rescale_betas_zero_snr=true", steps="5")
    assert "trailing*" in other.stdout and "-60" in other.stdout
    drawn = command("schedule", "-o", "x.png", steps="5")
    assert drawn.stdout == "x.png\n" and Image.open(drawn.written).width == 960
    told = json.loads(command("schedule", "--json", steps="5").stdout)
    assert told["timesteps"]["trailing"] == [999, 799, 599, 399, 199] and len(told["alphas_cumprod"]) == 1000


@pytest.mark.parametrize(
    ("arguments", "steps", "words"),
    (
        ([], "1001", "num_inference_steps=1001: must be .* 1000"),
        (["--set", "timestep_spacing=odd"], "5", "timestep_spacing='odd': must be one of"),
        (["--set", "beta_end=2"], "5", "beta_end=2"),
        (["--set", "colour=red"], "5", "--set colour: ddim has no such setting"),
        (["--set", "colour"], "5", "--set colour: must be NAME=VALUE"),
        (["-o", "x.jpg"], "5", "must end in .png"),
        (["-o", "nowhere/x.png"], "5", "nowhere: there is no such folder"),
    ),
)
def test_refusals(command, arguments, steps, words):
    assert refused(command("schedule", *arguments, steps=steps), words)
