"""LMS: a linear multistep method (Adams-Bashforth) in sigma; the last four derivatives, extrapolated.

As in k-diffusion: the polynomial through the last derivatives is integrated from sigma to the next sigma.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.checks import whole
from minisd.noise import Generators
from minisd.schedulers.base import StepResult, check_shapes
from minisd.schedulers.sigmas import SigmaScheduler, SpacedSigmas, scipy, x0_from_output


@dataclass(eq=False)
class LMSDiscreteScheduler(SpacedSigmas, SigmaScheduler):
    """Linear multistep: no more model calls than Euler, higher order. Needs SciPy, as in diffusers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set_timesteps(self.num_train_timesteps)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose N = `num_inference_steps` steps."""
        self.num_inference_steps = self._steps(num_inference_steps)
        self._use(*self._choose(self.num_inference_steps), device, final=0.0)

    def _forget(self) -> None:
        super()._forget()
        self.derivatives: deque[Tensor] = deque(maxlen=4)

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The integral from sigma_t to sigma_{t+1} of the Lagrange polynomial that is 1 at sigma_{t-current_order}."""

        def basis(tau: float) -> Tensor:
            product = torch.tensor(1.0)
            for k in range(order):
                if k != current_order:
                    here, other = self.sigmas[t - current_order], self.sigmas[t - k]
                    product = product * ((tau - other) / (here - other))
            return product

        quad = scipy("integrate", type(self).__name__).quad
        return float(quad(basis, self.sigmas[t], self.sigmas[t + 1], epsrel=1e-4)[0])

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        generator: Generators = None,
    ) -> StepResult:
        """One step of `order` 1 to 4; `model_output` and `sample`: (B, C, H, W). The rest is not used."""
        whole("order", order, 1, 4)
        check_shapes(model_output, sample)
        index = self._index(timestep)
        sigma = self.sigmas[index]
        x0 = x0_from_output(model_output, sample, sigma, self.prediction_type)
        self.derivatives.append((sample - x0) / sigma)
        order = min(index + 1, order)
        weights = [self.get_lms_coefficient(order, index, back) for back in range(order)]
        recent = reversed(self.derivatives)
        change = sum(weight * derivative for weight, derivative in zip(weights, recent, strict=False))
        self.step_index = index + 1
        return StepResult(sample + change, x0)
