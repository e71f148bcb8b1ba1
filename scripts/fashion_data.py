"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747; MIT licence, Zalando SE): the four IDX files of its distribution.

Debian's package `dataset-fashion-mnist` installs them in /usr/share/datasets/fashion-mnist.
"""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from minisd.batch.shards import read_samples

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
FOLDER = Path("/usr/share/datasets/fashion-mnist")
ANY = len(CLASSES)  # the label of a picture whose class is not told, for classifier-free guidance


def read_idx(path: Path) -> Tensor:
    """An IDX file of bytes, compressed or not -> uint8 tensor. Raises ValueError for anything else.

    Two zeros, 8 for bytes, the number of axes; their sizes as big-endian 32-bit integers; the bytes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    axes = data[3] if data[:3] == b"\0\0\x08" else 0
    shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes]) if len(data) >= 4 + 4 * axes else ()
    if not axes or len(data) - 4 - 4 * axes != torch.Size(shape).numel():
        raise ValueError(f"{path}: is no whole IDX file of bytes")
    return torch.frombuffer(bytearray(data[4 + 4 * axes :]), dtype=torch.uint8).reshape(shape)


def read_fashion(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """`part` "train" or "t10k" -> pictures (N, 1, 32, 32) uint8, padded with black, and labels (N,) int64.

    Raises ValueError where files are missing or broken.
    """
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        paths = [path for path in (folder / f"{part}-{kind}.gz", folder / f"{part}-{kind}") if path.is_file()]
        if not paths:
            raise ValueError(f"{folder}: has no {part}-{kind}.gz, which Debian's package dataset-fashion-mnist has")
        found.append(read_idx(paths[0]))
    pictures, labels = found
    if pictures.ndim != 3 or labels.shape != pictures.shape[:1] or labels.max() >= len(CLASSES):
        raise ValueError(f"{folder}: {part} pictures {list(pictures.shape)} and labels {list(labels.shape)} do not fit")
    height, width = (32 - size for size in pictures.shape[1:])
    padding = (width // 2, width - width // 2, height // 2, height - height // 2)
    return F.pad(pictures[:, None], padding), labels.long()


def read_shards(folder: Path) -> tuple[Tensor, Tensor]:
    """The same out of a folder that `minisd sample` made, whose prompts are classes."""
    samples = [parts for _, parts in read_samples(folder)]
    texts = [parts["txt"].decode() for parts in samples]
    if strange := [text for text in texts if text not in CLASSES]:
        raise ValueError(f"{folder}: {strange[0]!r} is none of {', '.join(CLASSES)}")
    if not samples:
        raise ValueError(f"{folder}: has no finished shards")
    pictures = [np.asarray(Image.open(io.BytesIO(parts["png"])).convert("L").resize((32, 32))) for parts in samples]
    return torch.from_numpy(np.stack(pictures))[:, None], torch.tensor([CLASSES.index(text) for text in texts])


def as_input(pictures: Tensor) -> Tensor:
    """uint8 pictures -> float32 in [-1, 1]."""
    return pictures.float() / 127.5 - 1
