"""minisd: Stable Diffusion 1.5 from scratch. Start reading at `pipeline.py`.

Letters in shape comments and papers, everywhere in this package:

    B batch    T tokens (77)    N, M positions    C channels    D width of a vector    H, W height and width
    x   latents of the diffusion process (B, 4, H, W)     t   timestep, 0 (clean) to 999 (noise)
    z   latents of the VAE, not scaled                    eps noise, or the UNet's prediction of it
    q, k, v   queries, keys, values of attention          x0  clean latents, scaled as x; x0-hat predicted

Importing this package loads nothing else: torch comes with the first name that needs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minisd.config import SD15 as SD15
    from minisd.files import CheckpointError as CheckpointError
    from minisd.pipeline import StableDiffusion as StableDiffusion
    from minisd.pixel.pipeline import PixelDiffusion as PixelDiffusion
    from minisd.schedulers import DDIMInverseScheduler as DDIMInverseScheduler
    from minisd.schedulers import DDIMScheduler as DDIMScheduler
    from minisd.schedulers import DDPMScheduler as DDPMScheduler
    from minisd.schedulers import DPMSolverMultistepScheduler as DPMSolverMultistepScheduler
    from minisd.schedulers import EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler
    from minisd.schedulers import EulerDiscreteScheduler as EulerDiscreteScheduler
    from minisd.schedulers import HeunDiscreteScheduler as HeunDiscreteScheduler
    from minisd.schedulers import LCMScheduler as LCMScheduler
    from minisd.schedulers import LMSDiscreteScheduler as LMSDiscreteScheduler
    from minisd.schedulers import PNDMScheduler as PNDMScheduler
    from minisd.schedulers import UniPCMultistepScheduler as UniPCMultistepScheduler
    from minisd.warn import NonFiniteWarning as NonFiniteWarning

__version__ = "0.2.0"

_HOME = {
    "CheckpointError": "minisd.files",
    "NonFiniteWarning": "minisd.warn",
    "SD15": "minisd.config",
    "PixelDiffusion": "minisd.pixel.pipeline",
    "StableDiffusion": "minisd.pipeline",
    **dict.fromkeys(
        (
            "DDIMInverseScheduler",
            "DDIMScheduler",
            "DDPMScheduler",
            "DPMSolverMultistepScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "LCMScheduler",
            "LMSDiscreteScheduler",
            "PNDMScheduler",
            "UniPCMultistepScheduler",
        ),
        "minisd.schedulers",
    ),
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minisd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
