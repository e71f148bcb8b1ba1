"""LCM: latent consistency models, which predict x0 in one to eight steps; noise is added back between them.

Luo et al. 2023, arXiv:2310.04378. For models distilled to it, or an LCM-LoRA on an ordinary one. In: the noise
prediction of such a model. Out: the predicted x0 at the noise level of the next timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from minisd.checks import require, whole
from minisd.noise import Generators, draw_noise
from minisd.schedulers import equations
from minisd.schedulers.base import StepResult, ThresholdingScheduler, check_shapes
from minisd.schedulers.sigmas import SteppingScheduler

SIGMA_DATA = 0.5  # of the boundary condition: f(x, 0) = x


@dataclass(eq=False)
class LCMScheduler(ThresholdingScheduler, SteppingScheduler):
    """Multistep consistency sampling (LCM, algorithm 3).

    `original_inference_steps`: the steps of the solver that the model was distilled from; N of those are taken.
    `timestep_scaling`: of the boundary condition's timestep. `set_alpha_to_one`: as in DDIM.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    _: KW_ONLY
    original_inference_steps: int = 50
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.final_alpha_cumprod = self.one if self.set_alpha_to_one else self.alphas_cumprod[0]
        self._forget()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Choose N of the distilled solver's steps, or give timesteps, descending; the last `strength` of them."""
        require((num_inference_steps is None) != (timesteps is None), "timesteps", timesteps, "given, or else steps")
        most = self.original_inference_steps if original_inference_steps is None else original_inference_steps
        whole("original_inference_steps", most, 1, self.num_train_timesteps)
        if timesteps is not None:
            given = [whole("timesteps", t, 0, self.num_train_timesteps - 1) for t in timesteps]
            require(bool(given) and all(a > b for a, b in pairwise(given)), "timesteps", given, "in descending order")
            self.num_inference_steps = len(given)
            chosen = np.array(given[len(given) - min(int(len(given) * strength), len(given)) :], dtype=np.int64)
        else:
            solver = np.arange(1, int(most * strength) + 1) * (self.num_train_timesteps // most) - 1
            steps = self.num_inference_steps = whole("num_inference_steps", num_inference_steps, 1, len(solver))
            chosen = solver[::-1][np.floor(np.linspace(0, len(solver), steps, endpoint=False)).astype(np.int64)]
        self.timesteps = torch.from_numpy(chosen.copy()).to(device)
        self._forget()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
    ) -> StepResult:
        """One step; `model_output` and `sample`: (B, C, H, W). Noise from `generator`; `eta` is not used."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is not set: call set_timesteps before step")
        check_shapes(model_output, sample)
        index, t = self._index(timestep), whole("timestep", timestep, 0, self.num_train_timesteps - 1)
        last = index + 1 >= len(self.timesteps)
        alpha_bar, alpha_bar_next = (
            self.alphas_cumprod[t],
            self.alpha_bar(t if last else int(self.timesteps[index + 1])),
        )
        x0 = self._limit(equations.x0_from_output(model_output, sample, alpha_bar, self.prediction_type))
        scaled = timestep * self.timestep_scaling  # a tensor stays float32
        skip, out = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
        denoised = prev_sample = out * x0 + skip * sample
        if index != self.num_inference_steps - 1:
            noise = draw_noise(model_output.shape, generator, model_output.device, denoised.dtype)
            prev_sample = equations.add_noise(denoised, noise, alpha_bar_next)
        self.step_index = index + 1
        return StepResult(prev_sample, denoised)
