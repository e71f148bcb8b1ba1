"""The diffusers dialect: programs written for diffusers run on minisd when their import lines change, and only these.

    from minisd.diffusers import StableDiffusionPipeline, DDIMScheduler    # was: from diffusers import ...
    from minisd.diffusers import CLIPTextModel, CLIPTokenizer              # was: from transformers import ...

The numbers stay the same, to the last bit where minisd's are diffusers' (see the README's ledger). Covered are

- `StableDiffusionPipeline`, `StableDiffusionImg2ImgPipeline`, `StableDiffusionInpaintPipeline` (`pipelines.py`):
  `from_pretrained`, `from_single_file`, `from_pipe`, `save_pretrained`, `to`, calling them, `encode_prompt`,
  `prepare_latents`, `decode_latents`, `image_processor`, replacing their parts; attention slicing and the like do
  nothing (in diffusers they round otherwise);
- `AutoencoderKL`, `UNet2DConditionModel` (`models.py`), `CLIPTextModel` and `CLIPTokenizer` (`text.py`):
  `from_pretrained`, calling them, `config`, and what a torch module can do (weights have minisd's names);
- `DDIMScheduler`, `DDPMScheduler`, `DDIMInverseScheduler`: minisd's own, which can come from the hub here too.

Not covered are, among others: other schedulers, LoRA, textual inversion, IP-Adapter, ControlNet, the safety checker,
attention processors, custom `timesteps` and `sigmas`, `padding_mask_crop`, networks without weights. Whatever is not
covered raises an error with its name: `NotCoveredError`, or AttributeError for a name after a dot. Unknown arguments,
which diffusers' calls ignore, are errors too, and so is running a pipeline with a scheduler that minisd has not: the
folder of SD 1.5 names PNDM, and a program must assign `pipe.scheduler` first.
"""

from importlib import import_module

from minisd.diffusers.image_processor import VaeImageProcessor
from minisd.diffusers.models import AutoencoderKL, UNet2DConditionModel
from minisd.diffusers.pipelines import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
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
from minisd.diffusers.text_encoder import CLIPTextModel
from minisd.diffusers.tokenizer import CLIPTokenizer

__all__ = [
    "AutoPipelineForImage2Image",
    "AutoPipelineForInpainting",
    "AutoPipelineForText2Image",
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTokenizer",
    "DDIMInverseScheduler",
    "DDIMScheduler",
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
    "UNet2DConditionModel",
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
