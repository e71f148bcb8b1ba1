"""Pictures in and out of the pipelines: PIL images, numpy arrays or tensors -> (B, C, H, W) in [-1, 1], and back.

A student need not read this file: `minisd.pipeline.to_pictures` is all that a picture needs on its way out.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from minisd.warn import check_finite

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class VaeImageProcessor:
    """What stands between people's pictures and the autoencoder; `pipe.image_processor` is one.

    `vae_scale_factor`: sizes are cut down to a multiple of it. `do_normalize`: [0, 1] becomes [-1, 1]. For masks:
    `do_convert_grayscale` to one channel, `do_binarize` to 0 and 1.
    """

    def __init__(
        self,
        *,
        vae_scale_factor: int = 8,
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_grayscale: bool = False,
    ) -> None:
        self.vae_scale_factor, self.do_normalize = vae_scale_factor, do_normalize
        self.do_binarize, self.do_convert_grayscale = do_binarize, do_convert_grayscale

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """One picture or a list -> (B, C, H, W).

        PIL images in mode "RGB" (masks: any mode); numpy arrays (H, W, C) or (B, H, W, C) and tensors (C, H, W) or
        (B, C, H, W) in [0, 1]. Tensors with four channels are latents and come back as they are. `height`, `width`
        in pixels: default the picture's own. Raises ValueError for anything else.
        """
        images = image if isinstance(image, list | tuple) else [image]
        if images and all(isinstance(one, Image.Image) for one in images):
            pixels = self._from_pil(images, height, width)
        else:
            pixels = self._from_arrays(images)
            if isinstance(images[0], Tensor) and pixels.shape[1] == 4:
                return pixels
            pixels = F.interpolate(pixels, size=self._size(height, width, (pixels.shape[2], pixels.shape[3])))
        if self.do_normalize:
            pixels = normalized(pixels)
        return (pixels >= 0.5).to(pixels.dtype) if self.do_binarize else pixels

    def _size(self, height: int | None, width: int | None, own: tuple[int, int]) -> tuple[int, int]:
        height, width = own[0] if height is None else height, own[1] if width is None else width
        return height - height % self.vae_scale_factor, width - width % self.vae_scale_factor

    def _from_pil(self, images: Sequence[Image.Image], height: int | None, width: int | None) -> Tensor:
        height, width = self._size(height, width, (images[0].height, images[0].width))
        arrays = []
        for image in images:
            # Resized before the conversion to grey, even to the same size: that order decides the rounding.
            resized = image.resize((width, height), resample=Image.Resampling.LANCZOS)
            if self.do_convert_grayscale:
                resized = resized.convert("L")
            elif resized.mode != "RGB":
                raise ValueError(f"image: its mode is {resized.mode!r}; give image.convert('RGB')")
            arrays.append(np.array(resized).astype(np.float32) / 255.0)
        stacked = torch.from_numpy(np.stack(arrays))
        return stacked[:, None] if stacked.ndim == 3 else rearrange(stacked, "b h w c -> b c h w")

    def _from_arrays(self, images: Sequence[Any]) -> Tensor:
        """Arrays or tensors -> (B, C, H, W): single ones are stacked, batches are put one after the other."""
        kinds = {type(one) for one in images}
        if len(kinds) != 1 or not issubclass(kinds.pop(), np.ndarray | Tensor):
            raise ValueError("image: must be a PIL image, a numpy array, a tensor, or a list of one of them")
        last = isinstance(images[0], np.ndarray)  # where the channels are
        tensors = [torch.as_tensor(one) for one in images]
        if self.do_convert_grayscale:  # masks may come without channels
            tensors = [with_channel(one, last=last) for one in tensors]
        joined = torch.cat(tensors) if tensors[0].ndim == 4 else torch.stack(tensors)
        if joined.ndim != 4:
            raise ValueError(f"image: {tuple(images[0].shape)} is not the shape of a picture")
        return rearrange(joined, "b h w c -> b c h w") if last else joined

    def postprocess(self, image: Tensor, output_type: str = "pil") -> Any:
        """Decoded images (B, 3, H, W) in [-1, 1] -> "pil": a list of pictures; "np": (B, H, W, 3) in [0, 1]; "pt":
        (B, 3, H, W) in [0, 1]; "latent": what was given. Raises ValueError for another `output_type`.
        """
        check_output_type(output_type)
        if output_type == "latent":
            return image
        check_finite(image, "images out of the VAE")
        image = (image * 0.5 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return image
        array = rearrange(image, "b c h w -> b h w c").cpu().float().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """(B, H, W, 3) or (H, W, 3) in [0, 1] -> pictures; one channel makes grey ones."""
        batch = images[None] if images.ndim == 3 else images
        pixels = (batch * 255).round().astype("uint8")
        return [Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in pixels]


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")


def with_channel(mask: Tensor, *, last: bool) -> Tensor:
    """(H, W), (B, H, W), or with the one channel already -> a mask that has its channel."""
    if mask.ndim == 3 and not (last and mask.shape[-1] == 1):
        return mask[..., None] if last else mask[:, None]
    return mask if mask.ndim >= 3 else mask[..., None] if last else mask[None]


def normalized(pixels: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]. Pixels below 0 are in [-1, 1] already, and stay: so diffusers guesses, with a warning too."""
    if pixels.min() < 0:
        warnings.warn("image: has values below 0, so it is taken to be in [-1, 1] already", FutureWarning, stacklevel=4)
        return pixels
    return 2.0 * pixels - 1.0
