"""Null-text optimisation: DDIM inversion of a picture, then an unconditional embedding learnt for each step."""

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch.optim import Adam


def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    scheduler, unet = pipe.scheduler, pipe.unet
    scheduler.set_timesteps(5)
    alphas, ahead = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps // scheduler.num_inference_steps

    def level(t):
        return alphas[t] if t >= 0 else scheduler.final_alpha_cumprod

    def move(eps, source, target, x):
        clean = (x - (1 - level(source)) ** 0.5 * eps) / level(source) ** 0.5
        return level(target) ** 0.5 * clean + (1 - level(target)) ** 0.5 * eps

    with torch.no_grad():
        text, empty = pipe.encode_prompt("red heart", "cpu", 1, True)
        pixels = torch.zeros(1, 3, 64, 64)
        pixels[:, 0, 20:50, 10:40] = 0.8
        path = [pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor]
        for t in reversed(scheduler.timesteps):
            eps = unet(path[-1], t, encoder_hidden_states=text).sample
            path.append(move(eps, min(int(t) - ahead, 999), int(t), path[-1]))

    found, x = {"inverted": path[-1]}, path[-1]
    for index, t in enumerate(scheduler.timesteps):
        empty = empty.detach().clone().requires_grad_()
        optimizer = Adam([empty], lr=1e-2 * (1 - index / 100))
        with torch.no_grad():
            conditional = unet(x, t, encoder_hidden_states=text).sample
        for _ in range(3):
            unconditional = unet(x, t, encoder_hidden_states=empty).sample
            eps = unconditional + 7.5 * (conditional - unconditional)
            loss = F.mse_loss(move(eps, int(t), int(t) - ahead, x), path[-index - 2])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found[f"loss {index}"] = loss.detach()
        with torch.no_grad():
            both = unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([empty, text])).sample
            unconditional, conditional = both.chunk(2)
            x = move(unconditional + 7.5 * (conditional - unconditional), int(t), int(t) - ahead, x)
        found[f"embedding {index}"] = empty.detach()
    return {**found, "reconstructed": x}
