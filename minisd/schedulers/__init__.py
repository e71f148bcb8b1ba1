"""Schedulers: the forward process of diffusion, and the reverse process step by step.

In: a model's output for a noisy sample at a timestep. Out: the sample at the previous timestep. The walk:
`equations.py` (the papers' equations, pure functions), `base.py` (noise schedule, timesteps), `ddpm.py`, `ddim.py`.
On the side, `settings.py`: the configuration and its file.

    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(50)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
"""

from minisd.schedulers.base import Scheduler, StepResult
from minisd.schedulers.ddim import DDIMInverseScheduler, DDIMScheduler
from minisd.schedulers.ddpm import DDPMScheduler
from minisd.schedulers.dpm_solver import DPMSolverMultistepScheduler
from minisd.schedulers.euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from minisd.schedulers.heun import HeunDiscreteScheduler
from minisd.schedulers.lcm import LCMScheduler
from minisd.schedulers.lms import LMSDiscreteScheduler
from minisd.schedulers.names import NAMES, make_scheduler, named
from minisd.schedulers.pndm import PNDMScheduler
from minisd.schedulers.settings import SchedulerConfig
from minisd.schedulers.unipc import UniPCMultistepScheduler

__all__ = [
    "NAMES",
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
    "Scheduler",
    "SchedulerConfig",
    "StepResult",
    "UniPCMultistepScheduler",
    "make_scheduler",
    "named",
]
