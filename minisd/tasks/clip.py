"""Guidance by CLIP: a loss that is small where a picture fits a text, for `LossGuidance`.

    # not run: fetches CLIP, 600 MB
    from transformers import CLIPModel, CLIPTokenizer          # pip install "minisd[clip]"

    name = "openai/clip-vit-base-patch32"
    clip = TransformersCLIP(CLIPModel.from_pretrained(name), CLIPTokenizer.from_pretrained(name))
    loss = clip_loss(clip, "a red heart")
    sd.text_to_image("sun", predict_noise=LossGuidance(sd, loss, scale=2))

CLIP sees what is decoded from the predicted x0 of each step, and the gradient of its opinion goes back to the latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training pictures


class ImageTextModel(Protocol):
    """What `clip_loss` needs: pictures and texts -> vectors that are near each other where they fit."""

    @property
    def size(self) -> int:
        """Height and width of the pictures that it sees."""

    def embed_images(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, size, size), normalised by `MEAN` and `STD` -> (B, D), with a gradient."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, D)."""


def clip_loss(model: ImageTextModel, text: str) -> Callable[[Tensor], Tensor]:
    """A loss of images (B, 3, H, W) in about [-1, 1] -> (B,): the angle between picture and text on the unit sphere,
    squared and halved (Crowson et al. 2022, arXiv:2204.08583).

    The loss of grey pictures (B, 1, H, W) is that of the same in three channels. Raises ValueError for an empty text.
    """
    if not text.strip():
        raise ValueError("text: is empty; say what the picture should show")
    with torch.no_grad():
        wanted = F.normalize(model.embed_texts([text]).float(), dim=-1)  # (1, D)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))

    def loss(images: Tensor) -> Tensor:
        side = (model.size, model.size)
        seen = F.interpolate(images.float(), size=side, mode="bicubic", antialias=True, align_corners=False)
        seen = ((seen / 2 + 0.5).expand(-1, 3, -1, -1) - mean.to(seen)) / std.to(seen)
        found = F.normalize(model.embed_images(seen).float(), dim=-1)  # (B, D)
        return 2 * ((found - wanted.to(found)).norm(dim=-1) / 2).arcsin() ** 2

    return loss


@dataclass(frozen=True)
class TransformersCLIP:
    """transformers' CLIPModel and its tokenizer, which a program loads itself: minisd does not import them."""

    model: Any
    tokenizer: Any

    @property
    def size(self) -> int:
        return int(self.model.config.vision_config.image_size)

    def embed_images(self, images: Tensor) -> Tensor:
        vision = self.model.vision_model(pixel_values=images.to(self.model.device, self.model.dtype))
        found: Tensor = self.model.visual_projection(vision.pooler_output)
        return found

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        ids = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        found: Tensor = self.model.text_projection(self.model.text_model(**ids).pooler_output)
        return found
