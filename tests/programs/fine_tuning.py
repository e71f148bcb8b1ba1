"""DreamBooth-style fine-tuning: the UNet and one new token learn from a few pictures; average, schedule, checkpoint."""

import tempfile

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from transformers import CLIPTextModel, CLIPTokenizer


def main(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", torch_dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    schedule = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    vae.requires_grad_(False)
    unet.enable_gradient_checkpointing()
    unet.train()

    assert tokenizer.add_tokens("<sks>") == 1
    encoder.resize_token_embeddings(len(tokenizer))
    table = encoder.get_input_embeddings().weight
    new, like = tokenizer.convert_tokens_to_ids("<sks>"), tokenizer.encode("heart", add_special_tokens=False)[0]
    table.data[new] = table.data[like]
    encoder.encoder.requires_grad_(False)
    encoder.final_layer_norm.requires_grad_(False)
    encoder.embeddings.position_embedding.requires_grad_(False)
    before = table.data.clone()

    weights = [*unet.parameters(), table]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=1e-2)
    rates = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=1, num_training_steps=4)
    average, losses = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config), []
    torch.manual_seed(0)
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    rows = tokenizer(["a <sks>"] * 2, padding="do_not_pad", truncation=True, max_length=77).input_ids
    ids = tokenizer.pad({"input_ids": rows}, padding="max_length", max_length=77, return_tensors="pt").input_ids
    for _ in range(3):
        latents = vae.encode(pictures).latent_dist.sample() * vae.config.scaling_factor
        noise = torch.randn_like(latents)
        times = torch.randint(0, schedule.config.num_train_timesteps, (2,))
        text = encoder(ids, return_dict=False)[0]
        eps = unet(schedule.add_noise(latents, noise, times), times, text, return_dict=False)[0]
        ratios = compute_snr(schedule, times)
        weight = torch.stack([ratios, 5.0 * torch.ones_like(times)], dim=1).min(dim=1)[0] / ratios
        loss = (F.mse_loss(eps.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3)) * weight).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        keep = torch.arange(len(tokenizer)) != new
        table.data[keep] = before[keep]
        average.step(unet.parameters())
        losses.append(loss.detach())
    average.store(unet.parameters())
    average.copy_to(unet.parameters())
    with tempfile.TemporaryDirectory() as place:
        pipe = StableDiffusionPipeline.from_pretrained(
            folder, unet=unet.eval(), text_encoder=encoder, tokenizer=tokenizer, torch_dtype=torch.float32
        )
        pipe.save_pretrained(place)
        again = StableDiffusionPipeline.from_pretrained(place, torch_dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(4)}
    image = again("a <sks>", **settings).images
    return {
        "losses": torch.stack(losses),
        "token": table.data[new],
        "image": image,
        "rate": torch.tensor(rates.get_last_lr()),
    }
