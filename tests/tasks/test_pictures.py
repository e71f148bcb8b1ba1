"""Pictures of every mode and file format, and what their pixels mean."""

import numpy as np
import pytest
import torch
from PIL import Image

from minisd.tasks import read_mask, read_picture, to_images
from minisd.tasks.pictures import as_mask, as_picture

RAMP = np.linspace(0, 65000, 256).astype(np.uint16).reshape(16, 16)
STROKE = (4, 4, 8, 8)


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")).astype(int)


DEEP = {
    "16 bits": (RAMP, "png"),
    "16 bits, TIFF": (RAMP, "tif"),
    "32 bits": (RAMP.astype(np.int32), "tif"),
    "32 bits, 8 of them used": ((RAMP // 257).astype(np.int32), "tif"),
    "floating point": ((RAMP / 65535).astype(np.float32), "tif"),
    "floating point to 255": ((RAMP / 257).astype(np.float32), "tif"),
}


@pytest.mark.parametrize(("values", "ending"), DEEP.values(), ids=DEEP)
def test_more_than_eight_bits_are_scaled(tmp_path, values, ending):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(values).save(path)
    wanted = (RAMP / 257).round().astype(int)
    for found in (read_picture(path), as_picture(Image.open(path)), read_mask(path)):
        assert abs(grey(found) - wanted).max() <= 1
    assert abs(to_images([Image.open(path)], 16, 16).mean()) < 0.02


@pytest.mark.parametrize("values", [[-1.0, 1.0], [0.0, 1e6], [0.0, np.nan]])
def test_pixels_of_no_range_are_refused(tmp_path, values):
    path = tmp_path / "x.tif"
    Image.fromarray(np.array([values], dtype=np.float32)).save(path)
    with pytest.raises(ValueError, match=rf"{path}: is not a picture.*pixels from"):
        read_picture(path)
    with pytest.raises(ValueError, match="must be 0 to 65535"):
        to_images([Image.open(path)], 8, 8)


def transparent(mode: str) -> Image.Image:
    """A red pixel, opaque, beside one that is transparent."""
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    if mode == "P":
        image = Image.new("P", (2, 1), 1)
        image.putpalette([255, 0, 0, 255, 0, 0])
        image.putpixel((0, 0), 0)
        image.info["transparency"] = 1
    if mode == "RGB":
        image = Image.new("RGB", (2, 1), (0, 0, 255))
        image.putpixel((0, 0), (255, 0, 0))
        image.info["transparency"] = (0, 0, 255)
    return image


@pytest.mark.parametrize("mode", ["RGBA", "P", "RGB"])
def test_what_is_transparent_is_white_in_a_picture(tmp_path, mode):
    image = transparent(mode)
    assert [as_picture(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    image.save(tmp_path / "x.png")
    assert np.array_equal(read_picture(tmp_path / "x.png"), as_picture(image))
    assert torch.equal(to_images([image], 1, 2)[0, :, 0], torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, 1.0]]))


def stroke(mode: str, colour, ground) -> Image.Image:
    image = Image.new(mode, (12, 12), ground)
    image.paste(colour, STROKE)
    return image


MASKS = {
    "white on a transparent layer": stroke("RGBA", (255, 255, 255, 255), (0, 0, 0, 0)),
    "white on transparent white": stroke("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)),
    "black on a transparent layer": stroke("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)),
    "red on a transparent layer": stroke("RGBA", (200, 0, 0, 255), (255, 255, 255, 0)),
    "white on opaque black": stroke("RGBA", (255, 255, 255, 255), (0, 0, 0, 255)),
    "grey and alpha": stroke("LA", (0, 255), (0, 0)),
    "one bit": stroke("1", 1, 0),
    "grey": stroke("L", 255, 0),
    "colours": stroke("RGB", (255, 255, 255), (0, 0, 0)),
    "CMYK": stroke("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_what_a_mask_means(mask):
    wanted = np.zeros((12, 12), bool)
    wanted[4:8, 4:8] = True
    assert np.array_equal(grey(as_mask(mask)) > 127, wanted)


def test_masks_without_anything_in_them():
    for nothing in (Image.new("RGBA", (4, 4), (255, 255, 255, 0)), Image.new("RGBA", (4, 4), (0, 0, 0, 255))):
        assert not grey(as_mask(nothing)).any()
    assert grey(as_mask(Image.new("RGBA", (4, 4), (255, 255, 255, 255)))).all()
    half = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    half.putpixel((0, 0), (0, 0, 0, 255))
    assert grey(as_mask(half)).tolist() == [[0, 255]]


def test_other_modes_and_formats(tmp_path):
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    for mode in ("CMYK", "YCbCr", "P", "RGBX"):
        assert abs(np.asarray(as_picture(red.convert(mode))).astype(int) - np.asarray(red)).max() < 60, mode
    for ending, settings in (("jpg", {"progressive": True}), ("webp", {"lossless": True}), ("bmp", {}), ("gif", {})):
        red.save(tmp_path / f"x.{ending}", **settings)
        assert abs(np.asarray(read_picture(tmp_path / f"x.{ending}")).astype(int) - np.asarray(red)).max() < 10


def test_exif_turns_files_and_images(tmp_path):
    tall = Image.new("RGB", (8, 16), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    tall.save(tmp_path / "x.jpg", exif=exif)
    assert read_picture(tmp_path / "x.jpg").size == as_picture(Image.open(tmp_path / "x.jpg")).size == (16, 8)


def test_an_animation_is_its_first_frame_and_that_is_said(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="x.gif: has 2 frames, of which the first is used"):
        assert read_picture(tmp_path / "x.gif").getpixel((0, 0)) == (255, 0, 0)


def test_files_cut_short_and_formats_that_are_not_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name, settings in {"a.jpg": {}, "b.jpg": {"progressive": True}, "c.png": {}}.items():
        Image.fromarray(noise).save(tmp_path / name, **settings)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"{name}: is not a picture that can be read .*trunc"):
            read_picture(tmp_path / name)
    (tmp_path / "d.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(ValueError, match=r"d.heic: is not a picture.*: it is HEIC, .*save it as PNG or JPEG"):
        read_picture(tmp_path / "d.heic")
