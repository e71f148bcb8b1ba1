"""The emoji model: Stable Diffusion 1.5's plan with small numbers, all of them here.

Pictures are 128 x 128 pixels, latents 16 x 16. Widths, norm groups, the depth of the text encoder and the vocabulary
are smaller than SD 1.5's; epsilons, activations, paddings and the noise schedule are the same. 15.5 million numbers.
"""

from minisd.config import TextEncoderConfig, UNetConfig, VAEConfig

VOCABULARY_SIZE = 2000
CONTEXT_LENGTH = 77

EMOJI_VAE = VAEConfig(
    sample_size=128,
    image_channels=3,
    latent_channels=4,
    widths=(32, 64, 96, 96),
    resnets_per_level=2,
    activation="silu",
    downsample_padding=0,
    norm_groups=8,
    norm_eps=1e-6,
    scaling_factor=1.0,  # measured at the end of train_vae.py
)

EMOJI_TEXT_ENCODER = TextEncoderConfig(
    vocabulary=VOCABULARY_SIZE,
    context_length=CONTEXT_LENGTH,
    width=128,
    layers=4,
    heads=2,
    hidden_width=512,
    activation="quick_gelu",
    layer_norm_eps=1e-5,
    projection=0,
)

EMOJI_UNET = UNetConfig(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    widths=(64, 96, 128, 128),
    attention=(True, True, True, False),
    depths=1,
    resnets_per_level=2,
    heads=8,
    linear_projections=False,
    context_width=EMOJI_TEXT_ENCODER.width,
    added_width=0,
    number_width=0,
    activation="silu",
    downsample_padding=1,
    norm_groups=8,
    norm_eps=1e-5,
    transformer_norm_eps=1e-6,
    layer_norm_eps=1e-5,
)
