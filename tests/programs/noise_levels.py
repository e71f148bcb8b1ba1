"""The schedule in numbers and as a drawing: how much of the picture is left at each timestep?"""

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from PIL import Image, ImageDraw


def plot(curves, width=200, height=100):
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for curve, colour in zip(curves, ("black", "red", "blue", "green"), strict=False):
        every = len(curve) / width
        points = [(x, round((1 - curve[int(x * every)].item()) * (height - 1))) for x in range(width)]
        draw.line(points, fill=colour)
    return picture


def main(folder):
    stable = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    schedules = {
        "stable diffusion": stable,
        "zero SNR": DDIMScheduler.from_config(stable.config, rescale_betas_zero_snr=True),
        "linear": DDPMScheduler(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02),
        "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }
    found = {name: scheduler.alphas_cumprod for name, scheduler in schedules.items()}
    for spacing in ("leading", "trailing", "linspace"):
        scheduler = DDIMScheduler.from_config(stable.config, timestep_spacing=spacing)
        scheduler.set_timesteps(10)
        found[f"{spacing} timesteps"] = scheduler.timesteps

    picture = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(5))
    times = torch.tensor([1, 250, 500, 999])
    found["noised"] = stable.add_noise(picture.repeat(4, 1, 1, 1), noise.repeat(4, 1, 1, 1), times)
    found["velocity"] = stable.get_velocity(picture.repeat(4, 1, 1, 1), noise.repeat(4, 1, 1, 1), times)
    found["snr"] = torch.log(stable.alphas_cumprod / (1 - stable.alphas_cumprod))
    found["drawing"] = plot([scheduler.alphas_cumprod for scheduler in schedules.values()])
    return found
