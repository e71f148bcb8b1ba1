"""A loop by hand with LMS: latents from a picture, embeddings mixed and moved, guidance by a loss on the prediction."""

import numpy as np
import torch
from diffusers import AutoencoderKL, LMSDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer


def main(folder):
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32)
    scheduler = LMSDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    for network in (vae, unet, encoder):
        network.requires_grad_(False)

    def embed(texts):
        rows = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return encoder(rows.input_ids)[0]

    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 16:48] = (200, 30, 40)
    pixels = torch.from_numpy(np.array(Image.fromarray(picture))).permute(2, 0, 1)[None] / 255 * 2 - 1
    clean = 0.18215 * vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
    found = {"clean": clean}

    scheduler.set_timesteps(12)
    start = 4
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    latents = scheduler.add_noise(clean, noise, timesteps=torch.tensor([scheduler.timesteps[start]]))
    mixed = 0.6 * embed(["red heart"]) + 0.4 * embed(["blue car"])
    table = encoder.get_input_embeddings().weight
    mixed[0, 2] += 0.01 * table[tokenizer("dog").input_ids[1]].mean()
    text = torch.cat([embed([""]), mixed])

    for index, t in enumerate(scheduler.timesteps):
        if index < start:
            continue
        sigma = scheduler.sigmas[index]
        scaled = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        with torch.no_grad():
            unconditional, conditional = unet(scaled, t, encoder_hidden_states=text)["sample"].chunk(2)
        eps = unconditional + 6.0 * (conditional - unconditional)
        if index % 3 == 0:
            latents = latents.detach().requires_grad_()
            guess = latents - sigma * eps
            images = vae.decode((1 / 0.18215) * guess).sample / 2 + 0.5
            loss = (images[:, 2] - 0.9).abs().mean() * 20
            gradient = torch.autograd.grad(loss, latents)[0]
            found[f"loss {index}"] = loss.detach()
            latents = latents.detach() - gradient * sigma**2
        latents = scheduler.step(eps, t, latents).prev_sample
        found[f"step {index}"] = latents.detach()
    return found
