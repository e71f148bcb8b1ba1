"""Inversion with the scheduler made for it, and the way back: how much of the picture survives the round trip?"""

import torch
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel


@torch.no_grad()
def main(folder):
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    up = DDIMInverseScheduler.from_pretrained(folder, subfolder="scheduler")
    down = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipe = StableDiffusionPipeline.from_pretrained(folder, unet=unet, vae=vae, torch_dtype=torch.float32)
    text = pipe.encode_prompt("a blue car", pipe.device, 1, False)[0]

    side = vae.config.sample_size
    ramp = torch.linspace(-1, 1, side).expand(1, 3, side, side)
    clean = vae.encode(ramp).latent_dist.mode() * vae.config.scaling_factor

    x = clean
    up.set_timesteps(8)
    for t in up.timesteps:
        x = up.step(unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample
    noise = x
    down.set_timesteps(8)
    for t in down.timesteps:
        x = down.step(unet(x, t, encoder_hidden_states=text, return_dict=False)[0], t, x, return_dict=False)[0]
    return {
        "upwards": up.timesteps,
        "noise": noise,
        "back": x,
        "error": (x - clean).abs().mean(),
        "picture": vae.decode(x / vae.config.scaling_factor).sample,
    }
