"""The pipelines where programs look for them: `from diffusers.pipelines.stable_diffusion import ...`."""

from minisd.diffusers.image_to_image import StableDiffusionImg2ImgPipeline
from minisd.diffusers.inpainting import StableDiffusionInpaintPipeline
from minisd.diffusers.outputs import Output as StableDiffusionPipelineOutput
from minisd.diffusers.text_to_image import StableDiffusionPipeline

__all__ = [
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionPipelineOutput",
]
