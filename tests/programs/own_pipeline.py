"""A pipeline written by oneself from loaded parts, with UniPC; the image at the end as a program shows it."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UniPCMultistepScheduler
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer


def main(folder):
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", use_safetensors=True, torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    scheduler = UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler")
    prompt = ["a red heart"]
    side = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    length = tokenizer.model_max_length
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    empty = tokenizer([""], padding="max_length", max_length=ids.shape[-1], return_tensors="pt").input_ids
    with torch.no_grad():
        text = torch.cat([encoder(empty)[0], encoder(ids)[0]])
    latents = torch.randn((1, unet.config.in_channels, side // 8, side // 8), generator=torch.manual_seed(0))
    latents = latents * scheduler.init_noise_sigma
    scheduler.set_timesteps(8)
    for t in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([latents] * 2), timestep=t)
        with torch.no_grad():
            unconditional, conditional = unet(doubled, t, encoder_hidden_states=text).sample.chunk(2)
        eps = unconditional + 7.5 * (conditional - unconditional)
        latents = scheduler.step(eps, t, latents).prev_sample
    with torch.no_grad():
        image = vae.decode(1 / 0.18215 * latents).sample
    image = (image / 2 + 0.5).clamp(0, 1).squeeze()
    pixels = (image.permute(1, 2, 0) * 255).to(torch.uint8).cpu().numpy()
    return {"latents": latents, "image": torch.from_numpy(pixels), "size": torch.tensor(Image.fromarray(pixels).size)}
