"""The official files of Stable Diffusion 1.5, by what their headers say: to recognise a download without reading it."""

from minisd.checkpoint.header import TensorInfo

# name, bytes, tensors, what it is. A file is named only if size and number of tensors match.
OFFICIAL = (
    ("v1-5-pruned-emaonly.safetensors", 4_265_146_304, 1145, "all of SD 1.5, averaged UNet under the usual names"),
    ("v1-5-pruned.safetensors", 7_703_324_286, 1831, "all of SD 1.5, raw and averaged UNet"),
    ("sd-v1-5-inpainting.safetensors", 4_265_203_873, 1145, "SD 1.5 for inpainting, nine channels in"),
    ("vae-ft-mse-840000-ema-pruned.safetensors", 334_641_190, 250, "the VAE with a better decoder"),
    ("unet/diffusion_pytorch_model.safetensors", 3_438_167_540, 686, "SD 1.5's UNet, averaged, float32"),
    ("unet/diffusion_pytorch_model.non_ema.safetensors", 3_438_167_536, 686, "SD 1.5's UNet, raw, float32"),
    ("unet/diffusion_pytorch_model.fp16.safetensors", 1_719_125_304, 686, "SD 1.5's UNet, float16"),
    ("vae/diffusion_pytorch_model.safetensors", 334_643_276, 248, "SD 1.5's VAE, float32"),
    ("vae/diffusion_pytorch_model.fp16.safetensors", 167_335_342, 248, "SD 1.5's VAE, float16"),
    ("sdxl-vae/diffusion_pytorch_model.safetensors", 334_643_268, 248, "SDXL's VAE: the same shapes, other weights"),
    ("text_encoder/model.safetensors", 492_265_874, 197, "SD 1.5's text encoder, float32"),
    ("text_encoder/model.fp16.safetensors", 246_144_864, 197, "SD 1.5's text encoder, float16"),
)


def official(tensors: dict[str, TensorInfo], size: int) -> str | None:
    """The official file that has this size and as many tensors, or None. (The bytes may still differ: compare sums.)"""
    for name, size_of_it, count, what in OFFICIAL:
        if size == size_of_it and len(tensors) == count:
            return f"{name} ({what})"
    return None
