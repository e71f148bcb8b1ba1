"""Each scheduler swapped in by `from_config`, with the options that people give it, and schedules of one's own."""

import tempfile

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

CHOICES = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "prk": (PNDMScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler_karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler_a": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpm": (DPMSolverMultistepScheduler, {}),
    "dpm_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
}


def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    config, found = pipe.scheduler.config, {}
    picture = Image.new("RGB", (64, 64), (20, 130, 40))
    for name, (kind, options) in CHOICES.items():
        with tempfile.TemporaryDirectory() as place:
            kind.from_config(config, **options).save_config(place)
            assert kind.load_config(place)["beta_schedule"] == "scaled_linear"
            pipe.scheduler = kind.from_config(place)
        seen = []
        shown = {"output_type": "latent", "generator": torch.Generator().manual_seed(2)}
        older = {
            "callback": lambda step, t, x, seen=seen: seen.append(torch.tensor([step, float(t), x.sum()])),
            "callback_steps": 2,
        }
        found[name] = pipe("red heart", num_inference_steps=6, **shown, **older).images
        found[name + "_callback"] = torch.stack(seen)
        if name == "prk":
            continue  # with an image, diffusers' Runge-Kutta steps begin in the middle
        image = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        image.set_progress_bar_config(disable=True)
        found[name + "_image"] = image("red heart", picture, 0.6, num_inference_steps=6, **shown).images
        config = pipe.scheduler.config

    for kind, own in (
        (DDPMScheduler, {"timesteps": [900, 600, 300, 20]}),
        (EulerDiscreteScheduler, {"sigmas": [12.0, 5.0, 1.0, 0.2]}),
        (HeunDiscreteScheduler, {"timesteps": [900, 600, 300, 20]}),
        (DPMSolverMultistepScheduler, {"timesteps": [900, 600, 300, 20]}),
    ):
        pipe.scheduler = kind.from_config(DDIMScheduler.from_config(folder, subfolder="scheduler").config)
        shown = {"output_type": "latent", "generator": torch.Generator().manual_seed(2)}
        found[kind.__name__ + "_own"] = pipe("red heart", **own, **shown).images
        image = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        image.set_progress_bar_config(disable=True)
        found[kind.__name__ + "_own_image"] = image("red heart", picture, 0.6, **own, **shown).images
    return found
