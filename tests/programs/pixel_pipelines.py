"""Unconditional DDPM and DDIM sampling, a bare UNet2DModel, saving and loading, in the words of diffusers."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel


def main(folder):
    with TemporaryDirectory() as empty:
        return run(Path(empty))


def run(folder):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=(8, 16),
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    found = {f"new {name}": weight for name, weight in unet.state_dict().items()}
    pipeline = DDPMPipeline(unet=unet, scheduler=DDPMScheduler(variance_type="fixed_large"))
    pipeline.set_progress_bar_config(disable=True)
    found["ddpm"] = sample(pipeline, num_inference_steps=9)
    pipeline.save_pretrained(folder / "ddpm")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    found["files"] = np.frombuffer(" ".join(files).encode(), dtype=np.uint8)

    again = DiffusionPipeline.from_pretrained(folder / "ddpm")
    again.set_progress_bar_config(disable=True)
    found["dispatched"] = type(again) is DDPMPipeline
    found["loaded"] = sample(again, num_inference_steps=9)
    ddim = DDIMPipeline.from_pretrained(folder / "ddpm")
    ddim.set_progress_bar_config(disable=True)
    found["ddim"] = sample(ddim, num_inference_steps=5)
    found["eta"] = sample(ddim, num_inference_steps=5, eta=0.7, use_clipped_model_output=True)
    found["tuple"] = ddim(num_inference_steps=2, output_type="np", return_dict=False, generator=seeded(2))[0]
    pictures = ddim(batch_size=2, num_inference_steps=2, generator=[seeded(3), seeded(4)]).images
    found["pictures"] = np.stack([np.array(picture) for picture in pictures])

    unet.save_pretrained(folder / "bare")
    bare = UNet2DModel.from_pretrained(folder / "bare")
    noisy = torch.randn(2, 3, 8, 16, generator=seeded(5))
    found["bare"] = bare(noisy, 7).sample.detach()
    found["by position"] = bare(noisy, torch.tensor([3, 900]), return_dict=False)[0].detach()
    found["size"] = list(bare.config.sample_size)
    return found


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sample(pipeline, **settings):
    return pipeline(batch_size=2, generator=seeded(1), output_type="pt", **settings).images
