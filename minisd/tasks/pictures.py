"""Pictures in: files or PIL images of any mode -> pictures of 8 bits, red, green and blue, or masks of 8 bits.

What is transparent means white in a picture, and not masked in a mask. More than 8 bits are scaled, not cut off. The
commands and the tasks read every picture here; `images.py` goes on from what comes out.
"""

import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from minisd.warn import warn

Pictures = Image.Image | Sequence[Image.Image]

DEEP = {"I;16", "I;16L", "I;16B", "I;16N", "I", "F"}  # Pillow's modes of more than 8 bits, all grey
SAME_SHADE = 8  # of 255: what antialiasing and JPEG may change in one shade
UNREAD = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"avif": "AVIF", b"avis": "AVIF"}


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Any picture file -> RGB, turned as its EXIF data say; what is transparent becomes white.

    Of an animation the first frame counts, with a warning. Raises ValueError for a file that is no picture, is cut
    short, or cannot be read.
    """
    return read(path, as_picture)


def read_mask(path: str | os.PathLike[str]) -> Image.Image:
    """Any picture file -> a mask of mode "L", white where to generate: see `as_mask`. Raises as `read_picture`."""
    return read(path, as_mask)


def read(path: str | os.PathLike[str], convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Open a file, and `convert` what Pillow finds in it."""
    try:
        with Image.open(os.path.expanduser(path)) as file:
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # a photograph with its preview
            picture = convert(file)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = unread(path) if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise ValueError(f"{path}: is not a picture that can be read{reason}") from None
    if frames > 1:
        warn(f"{path}: has {frames} frames, of which the first is used")
    return picture


def unread(path: str | os.PathLike[str]) -> str:
    """Which format it is that Pillow cannot read here, if its first bytes tell."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            start = file.read(12)
    except OSError:
        return ""
    name = UNREAD.get(start[8:12]) if start[4:8] == b"ftyp" else None
    return f": it is {name}, which this Pillow does not read; save it as PNG or JPEG" if name else ""


def as_picture(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> RGB, 8 bits each; what is transparent becomes white.

    Raises ValueError for pixels whose range cannot be told.
    """
    image = eight_bits(ImageOps.exif_transpose(image))
    if not image.has_transparency_data:
        return image.convert("RGB")
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def as_mask(image: Image.Image) -> Image.Image:
    """A PIL image of any mode -> a mask of mode "L", white where to generate.

    What is transparent is not masked. Where all that is visible has one shade, that shade means nothing: then what is
    visible is masked, be it black or white. Raises as `as_picture`.
    """
    image = eight_bits(ImageOps.exif_transpose(image))
    if not image.has_transparency_data:
        return image.convert("L")
    alpha = image.convert("RGBA").getchannel("A")
    opacity, shade = np.asarray(alpha), np.asarray(image.convert("RGBA").convert("L"))
    visible = shade[opacity > 0]
    if opacity.min() < opacity.max() and int(visible.max()) - int(visible.min()) <= SAME_SHADE:
        return alpha
    picture = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture).convert("L")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (0 to 65535), or floating point (0 to 1), scaled to 0 to 255; anything else stays as it is."""
    if image.mode not in DEEP:
        return image
    values = np.asarray(image).astype(np.float64)
    least, most = values.min(), values.max()
    if not 0 <= least <= most <= 65535 or (image.mode == "F" and most > 255):  # NaN too
        raise ValueError(f"pixels from {least:g} to {most:g} in mode {image.mode}: must be 0 to 65535, or 0 to 1")
    if image.mode == "F":
        factor = 255.0 if most <= 1 else 1.0
    else:  # mode "I" has 32 bits, and is what Pillow made of 16 for long: only a PNG tells
        factor = 1.0 if image.mode == "I" and most <= 255 and image.format != "PNG" else 255 / 65535
    grey = Image.fromarray((values * factor).round().astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):  # the one value that is transparent
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def as_list(pictures: Pictures, name: str = "image") -> list[Image.Image]:
    """One picture or several -> a list. Raises ValueError for anything else, or none."""
    found = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    if not found or not all(isinstance(picture, Image.Image) for picture in found):
        raise ValueError(f"{name}: must be a PIL image, or a list of at least one")
    return found


def to_images(pictures: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """PIL images of any mode -> (n, 3, H, W) float32 in [-1, 1], resized if need be (Lanczos, as diffusers does)."""
    resized = [as_picture(picture).resize((width, height), Image.Resampling.LANCZOS) for picture in pictures]
    pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in resized]) / 255
    return 2 * rearrange(torch.from_numpy(pixels), "n h w c -> n c h w") - 1
