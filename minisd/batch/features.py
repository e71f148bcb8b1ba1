"""The networks by which pictures are compared: small ones that come with minisd, and the usual ones, which are fetched.

Each takes pictures (B, 3, H, W) uint8 and gives features (B, n).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from minisd.checkpoint.hub import embedded_model

# Name -> what it is, and what is fetched at the first use.
NETWORKS = {
    "emoji": ("the small model's VAE: mean latents of 128x128 pixels, pooled to 4x4; 64 features", ""),
    "fashion": ("the classifier of the fashion model, before its last layer; 32x32 grey; 1536 features", ""),
    "inception": ("Inception v3 of the FID paper, by torch-fidelity; 299x299; 2048 features", "91 MB"),
}


def small_classifier(classes: int) -> nn.Sequential:
    """(B, 1, 32, 32) in [-1, 1] -> scores (B, classes)."""
    layers: list[nn.Module] = []
    for before, after in ((1, 32), (32, 64), (64, 96)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(96 * 4 * 4, classes))


@cache
def fashion_classifier() -> nn.Sequential:
    """The one that comes with the fashion model."""
    model = small_classifier(10)
    model.load_state_dict(load_file(embedded_model("fashion") / "classifier.safetensors"))
    return model.float().eval()


def as_input(pictures: Tensor, size: int) -> Tensor:
    """uint8 pictures -> (B, 3, size, size) in [-1, 1], resized with antialiasing where they have another size."""
    images = pictures.float() / 127.5 - 1
    return images if images.shape[2:] == (size, size) else F.interpolate(images, size=(size, size), **RESIZE)


RESIZE: dict[str, Any] = {"mode": "bilinear", "antialias": True}


class FashionFeatures(nn.Module):
    """The classifier without its last layer."""

    num_features = 96 * 4 * 4

    def __init__(self) -> None:
        super().__init__()
        self.layers = fashion_classifier()[:-1]

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 1536)."""
        features: Tensor = self.layers(as_input(pictures, 32).mean(dim=1, keepdim=True))
        return features


class EmojiFeatures(nn.Module):
    """The encoder of the small model's VAE."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        from minisd.pipeline import StableDiffusion

        self.vae = StableDiffusion.load("emoji").vae

    def forward(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, 64)."""
        mean = self.vae.encode(as_input(pictures, 128)).mean  # (B, 4, 16, 16)
        return F.adaptive_avg_pool2d(mean, 4).flatten(1)


def network(name: str) -> Any:
    """What torchmetrics takes as `feature`."""
    return {"fashion": FashionFeatures, "emoji": EmojiFeatures}[name]() if name != "inception" else 2048


@torch.no_grad()
def recognised(pictures: Tensor) -> Tensor:
    """The class (B,) that the fashion model's classifier takes each picture for."""
    scores: Tensor = fashion_classifier()(as_input(pictures, 32).mean(dim=1, keepdim=True))
    return scores.argmax(dim=1)
