"""Stable Diffusion put together from its parts: tokenizer, text encoder, UNet, scheduler, autoencoder; no pipeline."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

PROMPTS = ["a red heart", "a yellow smiling face"]


def embed(tokenizer, text_encoder, prompts):
    tokens = tokenizer(
        prompts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return text_encoder(tokens.input_ids)[0]


@torch.no_grad()
def main(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)

    text = torch.cat([embed(tokenizer, text_encoder, [""] * len(PROMPTS)), embed(tokenizer, text_encoder, PROMPTS)])
    results = {"text": text}
    for kind in (DDIMScheduler, DDPMScheduler):
        scheduler = kind.from_pretrained(folder, subfolder="scheduler")
        scheduler.set_timesteps(6)
        generator = torch.manual_seed(11)
        side = unet.config.sample_size
        x = torch.randn((len(PROMPTS), unet.config.in_channels, side, side), generator=generator)
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x] * 2), timestep=t)
            eps_none, eps_text = unet(both, t, encoder_hidden_states=text).sample.chunk(2)
            eps = eps_none + 7.5 * (eps_text - eps_none)
            x = scheduler.step(eps, t, x, generator=generator).prev_sample
        image = vae.decode(1 / vae.config.scaling_factor * x).sample
        image = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        pictures = [Image.fromarray(one) for one in (image * 255).round().to(torch.uint8).numpy()]
        results |= {f"{kind.__name__} latents": x, f"{kind.__name__} picture": pictures[1]}
    return results
