"""Images <-> latents: the KL autoencoder, a factor of 8 smaller in height and width.

`encode`: images (B, 3, 8H, 8W) in [-1, 1] -> a Gaussian over latents (B, 4, H, W). `decode`: latents -> images.
Diffusion works on latents times `scaling_factor`; this file knows them unscaled. Next in the walk: `layers.py`.
"""

import torch
from torch import Tensor, nn

from minisd.config import VAEConfig
from minisd.layers import ACTIVATIONS, Downsample, PixelAttention, ResnetBlock, Upsample
from minisd.noise import Generators, draw_noise


class Gaussian:
    """A diagonal Gaussian over latents, the approximate posterior: a mean and a variance for each element."""

    def __init__(self, moments: Tensor) -> None:
        """`moments` (B, 2C, H, W): means, then log-variances, clamped as CompVis does so that exp cannot overflow."""
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator: Generators = None) -> Tensor:
        """mean + std * noise (Kingma & Welling 2013, equation 10), the noise from `generator`: one, or one each."""
        return self.mean + self.std * draw_noise(self.mean.shape, generator, self.mean.device, self.mean.dtype)

    def mode(self) -> Tensor:
        """The most likely latents: the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, in nats, (B,) (Kingma & Welling 2013, appendix B)."""
        return 0.5 * torch.sum(self.mean**2 + self.logvar.exp() - 1.0 - self.logvar, dim=(1, 2, 3))


def resnet(in_width: int, out_width: int, config: VAEConfig) -> ResnetBlock:
    return ResnetBlock(
        in_width,
        out_width,
        time_width=None,
        groups=config.norm_groups,
        eps=config.norm_eps,
        activation=config.activation,
    )


def middle(config: VAEConfig) -> nn.ModuleList:
    width = config.widths[-1]
    attention = PixelAttention(width, heads=1, groups=config.norm_groups, eps=config.norm_eps, scale=1.0)
    return nn.ModuleList([resnet(width, width, config), attention, resnet(width, width, config)])


class Encoder(nn.Module):
    """Images -> moments of the posterior. Flat: resnets, a downsampling after each level but the last, the middle."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.conv_in = nn.Conv2d(config.image_channels, config.widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        width = config.widths[0]
        for level, level_width in enumerate(config.widths):
            for _ in range(config.resnets_per_level):
                self.down.append(resnet(width, level_width, config))
                width = level_width
            if level < len(config.widths) - 1:
                self.down.append(Downsample(width, padding=config.downsample_padding))
        self.middle = middle(config)
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 8H, 8W) -> (B, 8, H, W)."""
        x = self.conv_in(x)  # (B, widths[0], 8H, 8W)
        for block in (*self.down, *self.middle):
            x = block(x)  # at the end (B, widths[-1], H, W)
        return self.conv_out(self.activation(self.norm_out(x)))


class Decoder(nn.Module):
    """Latents -> images: the encoder in reverse, with one more resnet on each level."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        width = config.widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.middle = middle(config)
        self.up = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(config.widths))):
            for _ in range(config.resnets_per_level + 1):
                self.up.append(resnet(width, level_width, config))
                width = level_width
            if level > 0:
                self.up.append(Upsample(width))
        self.norm_out = nn.GroupNorm(config.norm_groups, width, eps=config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.image_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, 4, H, W) -> (B, 3, 8H, 8W)."""
        x = self.conv_in(z)  # (B, widths[-1], H, W)
        for block in (*self.middle, *self.up):  # at the end (B, widths[0], 8H, 8W)
            x = block(x, (2 * x.shape[2], 2 * x.shape[3])) if isinstance(block, Upsample) else block(x)
        return self.conv_out(self.activation(self.norm_out(x)))


class VAE(nn.Module):
    """The variational autoencoder (Kingma & Welling 2013, arXiv:1312.6114; Rombach et al. 2022, section 3.1)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.decoder = Decoder(config)

    @property
    def scaling_factor(self) -> float:
        """What latents are multiplied by before diffusion: one over their standard deviation over the training set."""
        return self.config.scaling_factor

    def encode(self, images: Tensor) -> Gaussian:
        """Images (B, 3, 8H, 8W) in [-1, 1] -> a Gaussian over latents (B, 4, H, W), unscaled."""
        return Gaussian(self.quant_conv(self.encoder(images)))

    def decode(self, latents: Tensor) -> Tensor:
        """Unscaled latents (B, 4, H, W) -> images (B, 3, 8H, 8W), about in [-1, 1] (not clamped)."""
        return self.decoder(self.post_quant_conv(latents))
