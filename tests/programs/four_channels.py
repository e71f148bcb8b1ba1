"""What the autoencoder makes of a picture: four channels to look at, and the picture again."""

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw


def drawing(side):
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((side // 8, side // 4, 3 * side // 4, 7 * side // 8), fill="crimson")
    draw.rectangle((side // 2, side // 8, 7 * side // 8, side // 2), fill=(20, 60, 200))
    return picture


def shown(channel):
    """One channel as a grey picture, darkest to brightest."""
    low, high = channel.min(), channel.max()
    return Image.fromarray(((channel - low) / (high - low) * 255).round().to(torch.uint8).numpy())


@torch.no_grad()
def main(folder):
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    pixels = torch.from_numpy(np.array(drawing(vae.config.sample_size))).float() / 127.5 - 1
    dist = vae.encode(pixels.permute(2, 0, 1)[None]).latent_dist
    sampled = dist.sample(generator=torch.Generator().manual_seed(0))

    channels = [shown(channel) for channel in sampled[0]]
    sheet = Image.new("L", (sum(one.width for one in channels), channels[0].height))
    for index, one in enumerate(channels):
        sheet.paste(one, (index * one.width, 0))

    z = vae.config.scaling_factor * dist.mode()
    again = vae.decode(z / vae.config.scaling_factor).sample
    return {
        "mean": dist.mean,
        "std": dist.std,
        "var": dist.var,
        "logvar": dist.logvar,
        "kl": dist.kl(),
        "sampled": sampled,
        "sheet": sheet,
        "again": again,
        "as a tuple": vae.decode(dist.mean, return_dict=False)[0],
        "error": (again - pixels.permute(2, 0, 1)).abs().mean(),
        "through": vae(pixels.permute(2, 0, 1)[None]).sample,
    }
