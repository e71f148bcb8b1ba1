"""Euler's method in sigma: the variance-exploding forms of DDIM (`EulerDiscreteScheduler`) and of DDPM (ancestral).

Karras et al. 2022, arXiv:2206.00364, algorithms 1 and 2; the ancestral step is that of k-diffusion. In: the noise
prediction at sigma. Out: the sample at the next, smaller sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisd.checks import require_one_of
from minisd.noise import Generators, draw_noise
from minisd.schedulers.base import StepResult, check_shapes
from minisd.schedulers.sigmas import (
    SigmaScheduler,
    SpacedSigmas,
    require_float_timestep,
    sigma_to_t,
    sigmas_of,
    x0_from_output,
)


@dataclass(eq=False)
class EulerDiscreteScheduler(SpacedSigmas, SigmaScheduler):
    """One Euler step of dx / dsigma = (x - x0) / sigma; with `s_churn` noise is added before it (Karras, algorithm 2).

    `interpolation_type`: sigmas of timesteps by "linear" or "log_linear" interpolation. `timestep_type` "continuous": a
    v-predicting model is conditioned on log(sigma) / 4. `final_sigmas_type`: the last step goes to "zero" or to
    "sigma_min". `sigma_min`, `sigma_max`: ends of Karras, exponential or beta sigmas.
    """

    _: KW_ONLY
    interpolation_type: str = "linear"
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: str = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: str = "zero"

    def _check_arguments(self) -> None:
        super()._check_arguments()
        require_one_of(("linear", "log_linear"), "interpolation_type", self.interpolation_type)
        require_one_of(("discrete", "continuous"), "timestep_type", self.timestep_type)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._condition_on_sigma(self.sigmas[:-1])

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose N steps, or give their timesteps, or N + 1 sigmas, the last being the end (0)."""
        steps = self._steps(num_inference_steps, timesteps, sigmas)
        if sigmas is not None:
            *levels, final = np.array(sigmas).astype(np.float32)
            found = np.array(levels)
            self._use(found, sigma_to_t(found, np.log(sigmas_of(self.alphas_cumprod))), device, final)
        else:
            chosen, where = self._choose(steps, timesteps)
            self._use(chosen, where, device, self._final_sigma())
        self.num_inference_steps = len(self.timesteps)
        self._condition_on_sigma(self.sigmas[:-1])

    def _choose(self, steps: int, given: Any = None) -> tuple[np.ndarray, np.ndarray]:
        sigmas, timesteps = super()._choose(steps, given)
        if self.interpolation_type == "log_linear" and self._spaced(sigmas, steps) is None:
            table = sigmas_of(self.alphas_cumprod)
            sigmas = torch.linspace(np.log(table[-1]), np.log(table[0]), steps + 1).exp().numpy()
        return sigmas, timesteps

    def _condition_on_sigma(self, sigmas: Tensor) -> None:
        if self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            self.timesteps = torch.Tensor([0.25 * sigma.log() for sigma in sigmas]).to(self.timesteps.device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
    ) -> StepResult:
        """One step; `model_output` and `sample`: (B, C, H, W). `eta` is not used."""
        require_float_timestep(timestep)
        check_shapes(model_output, sample)
        index = self._index(timestep)
        sample = sample.to(torch.float32)  # x0 + sigma eps is large: half precision would lose x0
        sigma = self.sigmas[index]
        gamma = min(s_churn / (len(self.sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma * (gamma + 1)
        if gamma > 0:
            noise = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype)
            sample = sample + noise * s_noise * (sigma_hat**2 - sigma**2) ** 0.5
        at = sigma if self.prediction_type == "v_prediction" else sigma_hat  # as in diffusers
        x0 = x0_from_output(model_output, sample, at, self.prediction_type)
        prev_sample = sample + (sample - x0) / sigma_hat * (self.sigmas[index + 1] - sigma_hat)
        self.step_index = index + 1
        return StepResult(prev_sample.to(model_output.dtype), x0)


@dataclass(eq=False)
class EulerAncestralDiscreteScheduler(SigmaScheduler):
    """An Euler step to a smaller sigma than the next one, then noise up to that: as DDPM does, in sigma."""

    _: KW_ONLY
    rescale_betas_zero_snr: bool = False

    def _check_arguments(self) -> None:
        super()._check_arguments()
        require_one_of(("epsilon", "v_prediction"), "prediction_type", self.prediction_type)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose N = `num_inference_steps` steps."""
        self.num_inference_steps = self._steps(num_inference_steps)
        self._use(*self._choose(self.num_inference_steps), device, final=0.0)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
    ) -> StepResult:
        """One step; `model_output` and `sample`: (B, C, H, W). Noise from `generator`; `eta` is not used."""
        require_float_timestep(timestep)
        check_shapes(model_output, sample)
        index = self._index(timestep)
        sample = sample.to(torch.float32)
        sigma, sigma_to = self.sigmas[index], self.sigmas[index + 1]
        x0 = x0_from_output(model_output, sample, sigma, self.prediction_type)
        sigma_up = (sigma_to**2 * (sigma**2 - sigma_to**2) / sigma**2) ** 0.5
        sigma_down = (sigma_to**2 - sigma_up**2) ** 0.5
        prev_sample = sample + (sample - x0) / sigma * (sigma_down - sigma)
        noise = draw_noise(model_output.shape, generator, model_output.device, model_output.dtype)
        prev_sample = prev_sample + noise * sigma_up
        self.step_index = index + 1
        return StepResult(prev_sample.to(model_output.dtype), x0)
