"""Walk a picture back into noise, by hand, and generate it anew from halfway under another prompt."""

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

STEPS = 10


def guided_noise(pipe, x, t, text, scale):
    unwanted, wanted = pipe.unet(torch.cat([x] * 2), t, encoder_hidden_states=text).sample.chunk(2)
    return unwanted + scale * (wanted - unwanted)


def move(pipe, x, eps, now, then):
    """The DDIM equation: the same sample at another noise level, whichever way."""
    alphas = pipe.scheduler.alphas_cumprod
    x0 = (x - (1 - alphas[now]).sqrt() * eps) / alphas[now].sqrt()
    return alphas[then].sqrt() * x0 + (1 - alphas[then]).sqrt() * eps


def invert(pipe, x, text):
    noisier = []
    timesteps = list(reversed(pipe.scheduler.timesteps))
    for t in pipe.progress_bar(timesteps[:-1]):
        now = max(0, t.item() - 1000 // STEPS)
        x = move(pipe, x, guided_noise(pipe, x, t, text, 1.5), now, t.item())
        noisier.append(x)
    return noisier


def sample(pipe, x, text, start):
    for i in range(start, STEPS):
        t = pipe.scheduler.timesteps[i]
        x = move(pipe, x, guided_noise(pipe, x, t, text, 3.5), t.item(), max(1, t.item() - 1000 // STEPS))
    return x


@torch.no_grad()
def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    generated = pipe("red heart", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1)).images[0]

    pixels = torch.from_numpy(np.array(generated)).permute(2, 0, 1)[None] / 255.0
    dist = pipe.vae.encode(pixels * 2 - 1).latent_dist
    latents = pipe.vae.config.scaling_factor * dist.sample(torch.Generator().manual_seed(2))

    pipe.scheduler.set_timesteps(STEPS)
    noisier = invert(pipe, latents, pipe._encode_prompt("red heart", pipe.device, 1, True, ""))
    start = STEPS // 2
    other = pipe._encode_prompt("green apple", pipe.device, 1, True, "")
    edited = sample(pipe, noisier[-(start + 1)], other, start)
    return {
        "noise": noisier[-1],
        "noisier": torch.stack(noisier),
        "edited": edited,
        "picture": pipe.numpy_to_pil(pipe.decode_latents(edited))[0],
    }
