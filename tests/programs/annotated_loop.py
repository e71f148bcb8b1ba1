"""The pipeline's loop, copied out and annotated: guidance, a negative prompt, several pictures, a little noise."""

import torch
from diffusers import StableDiffusionPipeline


@torch.no_grad()
def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None, use_safetensors=True, revision="main"
    ).to("cpu")
    pipe.set_progress_bar_config(disable=True)

    # 1. What was asked.
    prompt, negative_prompt = ["red heart", "a green tree"], ["blurry", "night"]
    guidance_scale, eta, steps, pictures = 6.0, 0.3, 4, 2
    generator = torch.Generator(pipe.device).manual_seed(42)

    # 2. The texts become vectors, each as often as there will be pictures of it; the unwanted ones come first.
    wanted, unwanted = pipe.encode_prompt(
        prompt,
        pipe.device,
        num_images_per_prompt=pictures,
        do_classifier_free_guidance=True,
        negative_prompt=negative_prompt,
    )
    text = torch.cat([unwanted, wanted])

    # 3. From much noise to none in a few steps.
    pipe.scheduler.set_timesteps(steps, device=pipe.device)

    # 4. Noise.
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    latents = pipe.prepare_latents(
        len(prompt) * pictures, pipe.unet.config.in_channels, side, side, text.dtype, pipe.device, generator
    )

    # 5. The loop.
    extra = pipe.prepare_extra_step_kwargs(generator, eta)
    previews = []
    with pipe.progress_bar(total=steps) as bar:
        for t in pipe.scheduler.timesteps:
            twice = pipe.scheduler.scale_model_input(torch.cat([latents] * 2), t)
            noise = pipe.unet(twice, t, encoder_hidden_states=text, return_dict=False)[0]
            noise_unwanted, noise_wanted = noise.chunk(2)
            noise = noise_unwanted + guidance_scale * (noise_wanted - noise_unwanted)
            stepped = pipe.scheduler.step(noise, t, latents, **extra)
            latents = stepped.prev_sample
            previews.append(stepped.pred_original_sample)
            bar.update()

    # 6. Latents become pixels.
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    images = pipe.image_processor.postprocess(decoded, output_type="pil")

    # 7. The same with one call.
    called = pipe(
        prompt,
        negative_prompt=negative_prompt,
        guidance_scale=guidance_scale,
        eta=eta,
        num_inference_steps=steps,
        num_images_per_prompt=pictures,
        generator=torch.Generator().manual_seed(42),
    ).images
    return {"latents": latents, "previews": torch.stack(previews), "first": images[0], "last": images[-1]} | {
        f"called {index}": image for index, image in enumerate(called)
    }
