"""Sample with DDIM without the scheduler's `step`: only its table of noise levels and the UNet are used."""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

STEPS, GUIDANCE = 8, 5.0


@torch.no_grad()
def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    text = pipe._encode_prompt("red heart", pipe.device, 1, True, "blue")

    pipe.scheduler.set_timesteps(STEPS, device=pipe.device)
    size = pipe.unet.config.sample_size
    x = torch.randn(1, pipe.unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(3))
    x = x * pipe.scheduler.init_noise_sigma

    walk = []
    for t in pipe.scheduler.timesteps:
        both = pipe.scheduler.scale_model_input(torch.cat([x, x]), t)
        unwanted, wanted = pipe.unet(both, t, encoder_hidden_states=text).sample.chunk(2)
        eps = unwanted + GUIDANCE * (wanted - unwanted)

        t_next = max(1, t.item() - 1000 // STEPS)
        now, then = pipe.scheduler.alphas_cumprod[t.item()], pipe.scheduler.alphas_cumprod[t_next]
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = then.sqrt() * x0 + (1 - then).sqrt() * eps
        walk.append(x)

    picture = pipe.numpy_to_pil(pipe.decode_latents(x))[0]
    return {"walk": torch.stack(walk), "picture": picture}
