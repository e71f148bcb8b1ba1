"""diffusers' networks: minisd's layers in diffusers' trees, so that code which walks and edits those trees runs.

`attention_processor.py` (attention and its processors), `blocks.py` (the inner modules), `network.py` (what networks
share), `unet.py`, `unet_2d.py`, `vae.py`. transformers' text encoder is in `minisd/diffusers/text_encoder.py`.
"""

from minisd.diffusers.models.tiny_vae import AutoencoderTiny
from minisd.diffusers.models.unet import UNet2DConditionModel
from minisd.diffusers.models.unet_2d import UNet2DModel
from minisd.diffusers.models.vae import AutoencoderKL

__all__ = ["AutoencoderKL", "AutoencoderTiny", "UNet2DConditionModel", "UNet2DModel"]
