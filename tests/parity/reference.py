"""The reference side of every parity test: diffusers' own classes, narrow, with every parameter shaken.

The twin has SD 1.5's 1,130 tensor names. Fresh networks have norms that do nothing and biases of zero, which would hide
half of the mistakes there are, so every parameter is moved.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel
from transformers import CLIPTokenizer as ReferenceTokenizer

from minisd import SD15
from minisd.checkpoint.tokenizer_files import write_folder
from minisd.tokenizer import CLIPTokenizer

NARROW = {"unet": (32, 64, 96, 128), "vae": (32, 32, 64, 64), "text": 128}
FULL = {"unet": (320, 640, 1280, 1280), "vae": (128, 256, 512, 512), "text": 768}


@torch.no_grad()
def shake(module: nn.Module) -> nn.Module:
    """Move every parameter by an amount that matters but keeps activations sane."""
    for parameter in module.parameters():
        spread = 0.1 if parameter.ndim == 1 else 0.3 * parameter.std().item()
        parameter.add_(torch.randn_like(parameter) * spread)
    return module.eval()


def reference_unet(widths: tuple[int, ...], text_width: int, **changes) -> UNet2DConditionModel:
    settings = {
        "sample_size": 8 if widths != FULL["unet"] else 64,
        "block_out_channels": widths,
        "cross_attention_dim": text_width,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    }
    return shake(UNet2DConditionModel(**(settings | changes)))


def reference_vae(widths: tuple[int, ...], **changes) -> AutoencoderKL:
    settings = {
        "sample_size": 64 if widths != FULL["vae"] else 512,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "latent_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    return shake(AutoencoderKL(**(settings | changes)))


def reference_text_encoder(width: int, **changes) -> CLIPTextModel:
    settings = {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width if width == 768 else 2 * width,
        "num_hidden_layers": 12,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "projection_dim": width,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }
    return shake(CLIPTextModel(CLIPTextConfig(**(settings | changes))))


def reference_pipeline(sizes: dict, scratch: Path) -> StableDiffusionPipeline:
    """diffusers' pipeline with the sizes given, SD 1.5's schedule and CLIP's vocabulary."""
    write_folder(CLIPTokenizer.clip(), scratch)
    pipeline = StableDiffusionPipeline(
        unet=reference_unet(sizes["unet"], sizes["text"]),
        vae=reference_vae(sizes["vae"]),
        text_encoder=reference_text_encoder(sizes["text"]),
        tokenizer=ReferenceTokenizer.from_pretrained(scratch),
        scheduler=DDIMScheduler.from_config(dict(SD15.scheduler)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def write_lora_by_hand(names: dict[str, str], changed, path: Path) -> None:
    """A LoRA of rank 2 for layers under a trainer's `names` -> minisd's; the model `changed` has it in its weights."""
    tensors, state = {}, changed.state()
    for name, ours in names.items():
        down, up = torch.randn(2, state[ours].shape[1]), torch.randn(state[ours].shape[0], 2)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(2.0)}
        state[ours].copy_(state[ours] + up @ down)
    save_file(tensors, path)
