"""What the studio does, without its page."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from minisd.metadata.reading import read_settings
from minisd.studio.bench import Bench, checked, opened, painted
from tests.tasks.conftest import tiny_folder  # noqa: F401  # a fixture

SETTINGS = {"steps": 2, "seed": 3, "guidance_scale": 4.0, "scheduler": "ddim", "negative_prompt": ""}


@pytest.fixture
def bench(tiny_folder, tmp_path):  # noqa: F811
    return Bench([str(tiny_folder)], tmp_path, allow_paths=False)


@pytest.fixture
def red() -> Image.Image:
    return Image.new("RGB", (64, 64), "red")


def test_generate_and_replay(bench):
    frames = list(bench.generate(bench.models[0], "cat", SETTINGS, None, 1.0))
    assert [frame.said for frame in frames] == ["step 1 of 2", "step 2 of 2", "seed 3"]
    assert frames[-1].settings["prompt"] == "cat" and read_settings(frames[-1].path).settings["seed"] == 3
    assert bench.replay(frames[-1].path)[1] == "equal to the bit"
    drawn = [list(bench.generate(bench.models[0], "cat", SETTINGS | {"seed": -1}, None, 1.0))[-1] for _ in range(2)]
    assert drawn[0].settings["seed"] != drawn[1].settings["seed"]


def test_edits(bench, red):
    model, steps = bench.models[0], SETTINGS | {"steps": 4}
    *_, changed = bench.image_to_image(model, "cat", steps, red, 0.5)
    assert changed.picture.size == (64, 64) and "minisd" not in Image.open(changed.path).text
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle([0, 0, 16, 16], fill=255)
    *_, filled = bench.inpaint(model, "cat", steps, red, mask, 1.0)
    assert (np.asarray(filled.picture)[40:, 40:] == (255, 0, 0)).all()
    *_, new = bench.rewrite(model, "red cat", "blue cat", steps, red)
    assert "without the change it comes back with" in new.said and new.picture.size == (64, 64)
    with pytest.raises(ValueError, match="no mask: draw"):
        bench.inpaint(model, "cat", steps, red, Image.new("L", (64, 64)), 1.0)


def test_weights(bench, tiny_folder):  # noqa: F811
    assert "UNet" in bench.inspect(bench.models[0]) or "unet" in bench.inspect(bench.models[0])
    assert bench.diff(*bench.models * 2)


def test_what_a_visitor_may_not(bench, tmp_path):
    with pytest.raises(ValueError, match="'/etc' is not offered"):
        next(bench.generate("/etc", "cat", SETTINGS, None, 1.0))
    for look in (bench.inspect, lambda model: bench.diff(bench.models[0], model)):
        with pytest.raises(ValueError, match="is not offered"):
            look(str(tmp_path))
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(bench.generate(bench.models[0], " ", SETTINGS, None, 1.0))
    for settings in ({"steps": 10**6}, {"width": 8192}, {"guidance_scale": 1e9}):
        with pytest.raises(ValueError, match="the studio takes at most"):
            checked(settings)


def test_uploads(tmp_path):
    Image.new("1", (5000, 5000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match=r"5000x5000 pixels; at most 16,000,000"):
        opened(str(tmp_path / "bomb.png"))
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(ValueError, match="not a picture"):
        opened(str(tmp_path / "text.png"))
    layer = Image.new("RGBA", (8, 8))
    layer.putpixel((2, 3), (0, 0, 0, 255))
    assert painted([layer]).getbbox() == (2, 3, 3, 4) and painted([]).getbbox() is None


def test_a_picture_of_several_is_not_replayed_here(bench, tmp_path, red):
    (tmp_path / "x").mkdir()
    frame = list(bench.generate(bench.models[0], "cat", SETTINGS, None, 1.0))[-1]
    record = json.loads(frame.picture.info["minisd"])
    frame.picture.info["minisd"] = json.dumps({**record, "call": "img2img", "files": {}})
    frame.picture.save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="made by `minisd img2img`"):
        bench.replay(str(tmp_path / "other.png"))
