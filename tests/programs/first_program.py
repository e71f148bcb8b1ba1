"""The first program of everybody: SD 1.5's folder names PNDM, and nothing is said of a scheduler."""

import tempfile

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from PIL import Image


def seeded():
    return torch.Generator("cpu").manual_seed(0)


def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    found, shown = {}, {"num_inference_steps": 6, "output_type": "np"}
    with tempfile.TemporaryDirectory() as place:
        pipe.save_pretrained(place, variant="fp16", safe_serialization=True)
        for name, kind in (("plain", StableDiffusionPipeline), ("any", DiffusionPipeline)):
            pipe = kind.from_pretrained(place, variant="fp16", use_safetensors=True, torch_dtype=torch.float32)
            pipe = pipe.to("cpu")
            pipe.vae.enable_slicing()
            pipe.set_progress_bar_config(disable=True)
            assert type(pipe.scheduler).__name__ == "PNDMScheduler" and pipe.config["scheduler"][1] == "PNDMScheduler"
            found[name] = pipe("red heart", generator=seeded(), **shown).images
        text = AutoPipelineForText2Image.from_pipe(pipe)
        image = AutoPipelineForImage2Image.from_pipe(pipe)
        mask = AutoPipelineForInpainting.from_pipe(pipe)
        size = pipe.vae_scale_factor * pipe.unet.config.sample_size
        picture, hole = Image.new("RGB", (size, size), (200, 30, 40)), Image.new("L", (size, size), 255)
        found["text"] = text("a dog", generator=seeded(), **shown).images
        found["image"] = image("a dog", picture, strength=0.7, generator=seeded(), **shown).images
        found["mask"] = mask("a dog", picture, hole, generator=seeded(), **shown).images
        loaded = AutoPipelineForText2Image.from_pretrained(place, variant="fp16", torch_dtype=torch.float32)
        loaded.set_progress_bar_config(disable=True)
        found["loaded"] = loaded("a dog", generator=seeded(), return_dict=False, **shown)[0]
    return found
