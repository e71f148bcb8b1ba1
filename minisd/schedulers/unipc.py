"""UniPC: a predictor of any order, and a corrector that uses the next model output for free.

When the model is called at the next timestep anyway, its output first corrects the sample that it was called with, and
then predicts the next one. Zhao et al. 2023, arXiv:2302.04867; the exponential step is that of `exponential.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisd.checks import require, require_one_of, whole
from minisd.noise import Generators
from minisd.schedulers.base import StepResult
from minisd.schedulers.exponential import ExponentialScheduler, Level, level


@dataclass(eq=False)
class UniPCMultistepScheduler(ExponentialScheduler):
    """Predictor-corrector.

    `predict_x0`: extrapolate x0 (better with guidance) or eps. `solver_type`: the function B(h) of the paper, "bh1" (h)
    or "bh2" (e^h - 1). `disable_corrector`: steps after which the corrector is left out, [0] with strong guidance.
    """

    _: KW_ONLY
    predict_x0: bool = True
    solver_type: str = "bh2"
    disable_corrector: Sequence[int] = field(default_factory=list)
    solver_p: Any = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.solver_type in ("midpoint", "heun", "logrho"):  # as in diffusers, for configurations of DPM-Solver
            self.solver_type = "bh2"
        require_one_of(("bh1", "bh2"), "solver_type", self.solver_type)
        for name in ("solver_p", "shift_terminal"):
            require(getattr(self, name) is None, name, getattr(self, name), "None: nothing else is covered")

    def _forget(self) -> None:
        super()._forget()
        self.last_sample: Tensor | None = None
        self.this_order = 0

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose N = `num_inference_steps` steps."""
        steps = whole("num_inference_steps", num_inference_steps, 1, self.num_train_timesteps)
        self._use(self._spread(steps, self.num_train_timesteps), steps, device)

    def _last_of_spaced(self, sigmas: np.ndarray) -> Any:
        return 0 if self.final_sigmas_type == "zero" else sigmas[-1]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        generator: Generators = None,
    ) -> StepResult:
        """Correct `sample`, then predict the next one; both (B, C, H, W). The rest is not used."""
        require(self.num_inference_steps is not None, "num_inference_steps", None, "set: call set_timesteps first")
        index = self._index(timestep)
        at = level(self.sigmas[index])
        converted = (self._x0 if self.predict_x0 else self._eps)(model_output, sample, at)
        x0 = converted if self.predict_x0 else (sample - at.sigma * converted) / at.alpha
        if index > 0 and index - 1 not in self.disable_corrector and self.last_sample is not None:
            sample = self._update(self.last_sample, at, index - 1, self.this_order, converted)
        self.model_outputs.append(converted)

        left = len(self.timesteps) - index
        order = min(self.solver_order, left) if self.lower_order_final else self.solver_order
        self.this_order = min(order, len(self.model_outputs))
        self.last_sample = sample
        prev_sample = self._update(sample, level(self.sigmas[index + 1]), index, self.this_order, None)
        self.step_index = index + 1
        return StepResult(prev_sample, x0)

    def _update(self, x: Tensor, to: Level, index: int, order: int, at_end: Tensor | None) -> Tensor:
        """UniPC, eq. 3: from step `index` to the level `to`, with the model's output there (corrector) or without.

        The sum over the differences of outputs is weighted so that polynomials are integrated exactly: R rho = b.
        """
        outputs, at = list(self.model_outputs), level(self.sigmas[index])
        newest, h = outputs[-1], to.log_snr - at.log_snr
        ratios, differences = [], []
        for back in range(1, order):
            ratio = (level(self.sigmas[index - back]).log_snr - at.log_snr) / h
            ratios.append(ratio)
            differences.append((outputs[-1 - back] - newest) / ratio)
        hh = -h if self.predict_x0 else h
        b_h = hh if self.solver_type == "bh1" else torch.expm1(hh)
        rho = self._rho(torch.stack([*ratios, torch.ones(())]), hh, b_h, predicts=at_end is None)
        rho = rho.to(x.device, x.dtype, non_blocking=True)

        total: Any = 0
        if differences:
            stacked = torch.stack(differences, dim=1)  # (B, order - 1, C, H, W)
            total = torch.einsum("k,bkc...->bc...", rho if at_end is None else rho[:-1], stacked)
        if at_end is not None:
            total = total + rho[-1] * (at_end - newest)
        e = torch.expm1(hh)
        if self.predict_x0:
            linear = to.sigma / at.sigma * x - to.alpha * e * newest
            return (linear - to.alpha * b_h * total).to(x.dtype)
        linear = to.alpha / at.alpha * x - to.sigma * e * newest
        return (linear - to.sigma * b_h * total).to(x.dtype)

    @staticmethod
    def _rho(ratios: Tensor, hh: Tensor, b_h: Tensor, *, predicts: bool) -> Tensor:
        """The weights that solve R rho = b (UniPC, theorem 3.1); of low order they are 1/2."""
        order = len(ratios)
        if order == (2 if predicts else 1):
            return torch.ones(1) * 0.5
        if predicts and order == 1:
            return torch.ones(0)
        rows, b, phi, factorial = [], [], torch.expm1(hh) / hh - 1, 1
        for i in range(1, order + 1):
            rows.append(torch.pow(ratios, i - 1))
            b.append(phi * factorial / b_h)
            factorial *= i + 1
            phi = phi / hh - 1 / factorial
        matrix, right = torch.stack(rows), torch.stack(b)
        return torch.linalg.solve(matrix[:-1, :-1], right[:-1]) if predicts else torch.linalg.solve(matrix, right)
