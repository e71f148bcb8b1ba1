"""A LoRA trained with the peft library in both networks, then read back as the state dict that is saved."""

import tempfile

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict


def main(folder):
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False)
    torch.manual_seed(0)
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]), pipe.text_encoder)
    trained = [one for part in (pipe.unet, pipe.text_encoder) for one in part.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(2):
        text = pipe.encode_prompt(["red heart", "blue car"], "cpu", 1, False)[0]
        noise, times = torch.randn(2, 4, 8, 8), torch.randint(0, 1000, (2,))
        noised = schedule.add_noise(torch.ones(2, 4, 8, 8), noise, times)
        loss = F.mse_loss(pipe.unet(noised, times, encoder_hidden_states=text).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    state = get_peft_model_state_dict(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    fresh = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as place:
        StableDiffusionPipeline.save_lora_weights(place, unet_lora_layers=state)
        fresh.load_lora_weights(place)
        loaded = fresh("red heart", 64, 64, 2, generator=torch.Generator().manual_seed(1), output_type="latent").images
    generator = torch.Generator().manual_seed(1)
    image = pipe("red heart", num_inference_steps=2, generator=generator, output_type="latent").images
    return {
        "losses": torch.stack(losses),
        "count": torch.tensor(len(trained)),
        "image": image,
        "loaded": loaded,
        **state,
    }
