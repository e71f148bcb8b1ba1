"""One model, many schedulers: what their options do to the same noise."""

import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline

OPTIONS = {
    "as it is": {},
    # The model was trained to predict noise, of which nothing can be learned where there is nothing else: so it is
    # taken at another word here, and what comes out is no picture, but numbers to compare.
    "zero SNR": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    },
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "alpha to one": {"set_alpha_to_one": True},
    "clipped": {"clip_sample": True, "clip_sample_range": 2.0},
}


def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    found = {}
    for name, options in OPTIONS.items():
        pipe.scheduler = DDIMScheduler.from_config(config, **options)
        found[name] = pipe(
            "red heart",
            num_inference_steps=5,
            guidance_scale=7.5,
            guidance_rescale=0.7 if options else 0.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        found[f"{name}, timesteps"] = pipe.scheduler.timesteps
        found[f"{name}, levels"] = pipe.scheduler.alphas_cumprod
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    found["DDPM"] = pipe("red heart", num_inference_steps=5, generator=torch.manual_seed(0), output_type="np").images
    return found
