"""The diffusers dialect: programs written for diffusers run on minisd when their import lines change, and only these.

    from minisd.diffusers import StableDiffusionPipeline, DDIMScheduler    # was: from diffusers import ...
    from minisd.diffusers import CLIPTextModel, CLIPTokenizer              # was: from transformers import ...

The numbers stay the same, to the last bit where minisd's are diffusers'. What is covered, and what is not and why, is
in the README.md beside this file. Whatever is not covered raises an error with its name: `NotCoveredError`,
AttributeError for a name after a dot, ImportError for an import. Unknown arguments, which diffusers' calls ignore, are
errors too.
"""

from importlib import import_module

from minisd.diffusers.image_processor import VaeImageProcessor
from minisd.diffusers.models import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, UNet2DModel
from minisd.diffusers.pipelines import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from minisd.diffusers.refusing import NotCoveredError
from minisd.diffusers.schedulers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from minisd.diffusers.text_encoder import CLIPTextModel, CLIPTextModelWithProjection
from minisd.diffusers.tokenizer import CLIPTokenizer

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "AutoencoderKL",
    "AutoencoderTiny",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPTokenizer",
    "DDIMInverseScheduler",
    "DDIMPipeline",
    "DDIMScheduler",
    "DDPMPipeline",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DiffusionPipeline",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "NotCoveredError",
    "PNDMScheduler",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLPipeline",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UniPCMultistepScheduler",
    "VaeImageProcessor",
]


SUBMODULES = (
    "image_processor",
    "loaders",
    "models",
    "optimization",
    "pipelines",
    "schedulers",
    "training_utils",
    "utils",
)


def __getattr__(name: str) -> object:
    if name in SUBMODULES:
        return import_module(f"minisd.diffusers.{name}")
    if name.startswith("_"):
        raise AttributeError(f"module 'minisd.diffusers' has no attribute {name!r}")
    raise ImportError(f"{name} is not covered by minisd.diffusers, which has {', '.join(__all__)}")
