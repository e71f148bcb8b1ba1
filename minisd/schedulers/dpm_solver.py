"""DPM-Solver and DPM-Solver++: orders 1 to 3 at one model call a step, deterministic or stochastic (SDE).

The usual choice for few steps: "DPM++ 2M" is order 2 of "dpmsolver++" with Karras sigmas or without. The equations are
in `exponential.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch import Tensor

from minisd.checks import require, require_one_of, whole
from minisd.noise import Generators, draw_noise
from minisd.schedulers.base import StepResult
from minisd.schedulers.ddpm import VARIANCE_TYPES
from minisd.schedulers.exponential import ExponentialScheduler, divided_differences, level, step_weights

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
FEW = 15  # steps: below, `lower_order_final` applies


@dataclass(eq=False)
class DPMSolverMultistepScheduler(ExponentialScheduler):
    """The multistep solver of the papers.

    `algorithm_type`: "dpmsolver++" extrapolates x0 (better with guidance), "dpmsolver" eps; "sde-" adds noise.
    `solver_type`: "midpoint" or "heun", for order 2. `euler_at_final`: order 1 in the last step.
    `lambda_min_clipped`: the least log-SNR to start from, for cosine schedules. `variance_type`: "learned" and
    "learned_range" models have the variance among their channels, which is dropped.
    """

    _: KW_ONLY
    algorithm_type: str = "dpmsolver++"
    solver_type: str = "midpoint"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    lambda_min_clipped: float = -float("inf")
    variance_type: str | None = None

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.algorithm_type == "deis":  # as in diffusers, for configurations of related solvers
            self.algorithm_type = "dpmsolver++"
        if self.solver_type in ("logrho", "bh1", "bh2"):
            self.solver_type = "midpoint"
        require_one_of(ALGORITHMS, "algorithm_type", self.algorithm_type)
        require_one_of(("midpoint", "heun"), "solver_type", self.solver_type)
        if self.variance_type is not None:  # a DDPM's configuration has a fixed one, which has no effect here
            require_one_of(VARIANCE_TYPES, "variance_type", self.variance_type)
        ends = self.algorithm_type.endswith("++") or self.final_sigmas_type != "zero"
        require(
            ends, "final_sigmas_type", "zero", f'"sigma_min" for {self.algorithm_type}: eps at sigma 0 divides by 0'
        )
        third = self.algorithm_type == "sde-dpmsolver" and self.solver_order == 3
        require(not third, "solver_order", 3, "1 or 2 for sde-dpmsolver")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        mu: None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose N = `num_inference_steps` steps, or give their timesteps. `mu` is for flow matching: None here."""
        require((num_inference_steps is None) != (timesteps is None), "timesteps", timesteps, "given, or else steps")
        require(mu is None, "mu", mu, "None")
        self._refuse_given("timesteps", timesteps)
        if timesteps is not None:
            return self._use(np.array(timesteps).astype(np.int64), len(timesteps), device)
        steps = whole("num_inference_steps", num_inference_steps, 1, self.num_train_timesteps)
        clipped = torch.searchsorted(torch.flip(self.lambda_t, [0]), self.lambda_min_clipped)
        return self._use(self._spread(steps, self.num_train_timesteps - int(clipped)), steps, device)

    @property
    def rounds(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.beta_schedule == "squaredcos_cap_v2" else ("use_karras_sigmas",)

    def convert_model_output(self, model_output: Tensor, *, sample: Tensor) -> Tensor:
        """The model's output as what the algorithm extrapolates: x0 for the ++ ones, else eps."""
        if self.variance_type in ("learned", "learned_range") and self.prediction_type == "epsilon":
            model_output = model_output[:, :3]
        at = level(self.sigmas[self.step_index or 0])
        if self.algorithm_type.endswith("++"):
            return self._x0(model_output, sample, at)
        eps = self._eps(model_output, sample, at)
        if not self.thresholding:
            return eps
        return (sample - at.alpha * self._limit((sample - at.sigma * eps) / at.alpha)) / at.sigma

    def _order(self, index: int) -> int:
        """How many outputs this step uses: as many as there are, fewer at the end."""
        left, few = len(self.timesteps) - index, self.lower_order_final and len(self.timesteps) < FEW
        if left == 1 and (self.euler_at_final or few or self.final_sigmas_type == "zero"):
            return 1
        order = min(self.solver_order, len(self.model_outputs))
        return min(order, 2) if left == 2 and few else order

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
    ) -> StepResult:
        """One step; `model_output` and `sample`: (B, C, H, W).

        The SDE algorithms draw noise from `generator`, unless it is given as `variance_noise`. `eta` is not used.
        """
        require(self.num_inference_steps is not None, "num_inference_steps", None, "set: call set_timesteps first")
        index = self._index(timestep)
        converted = self.convert_model_output(model_output, sample=sample)
        self.model_outputs.append(converted)
        order = self._order(index)
        to, levels = level(self.sigmas[index + 1]), [level(self.sigmas[i]) for i in range(index - order + 1, index + 1)]
        terms = divided_differences(list(self.model_outputs)[-order:], levels, to)
        of_sample, weights, of_noise = step_weights(self.algorithm_type, to, levels[-1])
        if order == 3 or self.solver_type == "heun":
            del weights[1]

        x = of_sample * sample.to(torch.float32)
        for weight, term in zip(weights, terms, strict=False):
            x = x + weight * term
        if of_noise is not None:
            if variance_noise is None:
                variance_noise = draw_noise(converted.shape, generator, converted.device, torch.float32)
            x = x + of_noise * variance_noise.to(converted.device, torch.float32)
        x0 = converted if self.algorithm_type.endswith("++") else self._x0_of_eps(converted, sample, index)
        self.step_index = index + 1
        return StepResult(x.to(converted.dtype), x0)

    def _x0_of_eps(self, eps: Tensor, sample: Tensor, index: int) -> Tensor:
        at = level(self.sigmas[index])
        return (sample - at.sigma * eps) / at.alpha
