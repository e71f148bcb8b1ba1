"""The exponential step that DPM-Solver and UniPC share: exact in the linear part of the ODE, multistep in the rest.

In log-SNR, lambda = log(alpha / sigma), the diffusion ODE is linear but for the model's output. Its linear part has an
exact solution (the exponential); the output is extrapolated from the last few, so that each step calls the model once.

    DPM     Lu et al. 2022, DPM-Solver, arXiv:2206.00927
    DPM++   Lu et al. 2022, DPM-Solver++, arXiv:2211.01095
    UniPC   Zhao et al. 2023, UniPC: A Unified Predictor-Corrector Framework, arXiv:2302.04867

In: sigmas (as in `sigmas.py`), the last model outputs, converted to x0 or eps. Out: the weights of a step. The order of
operations is diffusers', as everywhere. Next: `dpm_solver.py` and `unipc.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisd.checks import require, whole
from minisd.schedulers import equations
from minisd.schedulers.sigmas import ALMOST_ZERO, SpacedSigmas, sigma_to_t, sigmas_of


class Level(NamedTuple):
    """A noise level: a sample is alpha x0 + sigma eps, with alpha^2 + sigma^2 = 1; lambda = log(alpha / sigma)."""

    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor


def level(sigma: Tensor) -> Level:
    """Variance exploding -> preserving: alpha = 1 / sqrt(sigma^2 + 1)."""
    alpha = 1 / (sigma**2 + 1) ** 0.5
    sigma = sigma * alpha
    return Level(alpha, sigma, torch.log(alpha) - torch.log(sigma))


def step_weights(algorithm: str, to: Level, at: Level) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """DPM-Solver's step from `at` to `to`: the weights of the sample, of the derivatives, and of noise.

    The derivatives' weights are those of D0; of D1 by the midpoint rule; of D1 exactly ("heun", and in third order);
    and of D2 (DPM++, eq. 12 and appendix B; the stochastic ones: DPM++, eq. 18 and 19).
    """
    h = to.log_snr - at.log_snr
    if algorithm == "dpmsolver++":
        e = torch.exp(-h) - 1.0
        d0, exact, second = -(to.alpha * e), to.alpha * (e / h + 1.0), -(to.alpha * ((e + h) / h**2 - 0.5))
        return to.sigma / at.sigma, [d0, 0.5 * d0, exact, second], None
    if algorithm == "sde-dpmsolver++":
        e = 1.0 - torch.exp(-2.0 * h)
        d0, exact = to.alpha * e, to.alpha * (e / (-2.0 * h) + 1.0)
        second = to.alpha * ((e - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
        return to.sigma / at.sigma * torch.exp(-h), [d0, 0.5 * d0, exact, second], to.sigma * torch.sqrt(e)
    e = torch.exp(h) - 1.0
    d0, exact, second = -(to.sigma * e), -(to.sigma * (e / h - 1.0)), -(to.sigma * ((e - h) / h**2 - 0.5))
    if algorithm == "dpmsolver":
        return to.alpha / at.alpha, [d0, 0.5 * d0, exact, second], None
    noise = to.sigma * torch.sqrt(torch.exp(2 * h) - 1.0)
    return to.alpha / at.alpha, [2.0 * d0, d0, 2.0 * exact, second], noise


def divided_differences(outputs: Sequence[Tensor], levels: Sequence[Level], to: Level) -> list[Tensor]:
    """D0, D1, D2 of the last model outputs (the newest last), as many as there are (DPM++, appendix B)."""
    at = levels[-1]
    h = to.log_snr - at.log_snr
    if len(outputs) == 1:
        return [outputs[-1]]
    r0 = (at.log_snr - levels[-2].log_snr) / h
    first = 1.0 / r0 * (outputs[-1] - outputs[-2])
    if len(outputs) == 2:
        return [outputs[-1], first]
    r1 = (levels[-2].log_snr - levels[-3].log_snr) / h
    before = 1.0 / r1 * (outputs[-2] - outputs[-3])
    return [
        outputs[-1],
        first + r0 / (r0 + r1) * (first - before),
        1.0 / (r0 + r1) * (first - before),
    ]


# What diffusers has for models of other families, and the values at which it does nothing.
FLOW = {"use_flow_sigmas": False, "use_dynamic_shifting": False, "use_lu_lambdas": False}


@dataclass(eq=False)
class ExponentialScheduler(SpacedSigmas):
    """Base of DPM-Solver and UniPC: timesteps of training, sigmas beside them, the last model outputs.

    `solver_order`: how many outputs a step uses, 1 to 3. `lower_order_final`: fewer in the last steps, which is more
    stable where N is small. `final_sigmas_type`: the last step goes to "zero" or to "sigma_min".
    """

    _: KW_ONLY
    solver_order: int = 2
    timestep_spacing: str = "linspace"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    lower_order_final: bool = True
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"

    rounds: ClassVar[tuple[str, ...]] = ("use_karras_sigmas",)  # spacings whose timesteps are rounded, not truncated

    def _check_arguments(self) -> None:
        super()._check_arguments()
        whole("solver_order", self.solver_order, 1, 3)
        for name, neutral in FLOW.items():
            value = getattr(self, name, neutral)
            require(value == neutral, name, value, f"{neutral}: flow matching and Lu's spacing are not covered")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = ALMOST_ZERO
        self.alpha_t, self.sigma_t = torch.sqrt(self.alphas_cumprod), torch.sqrt(1 - self.alphas_cumprod)
        self.lambda_t = torch.log(self.alpha_t) - torch.log(self.sigma_t)
        self.sigmas = torch.from_numpy(sigmas_of(self.alphas_cumprod))
        self._forget()

    def _forget(self) -> None:
        super()._forget()
        self.model_outputs: deque[Tensor] = deque(maxlen=self.solver_order)

    def _use(self, timesteps: np.ndarray, steps: int, device: Any) -> None:
        """Take these timesteps and their sigmas for the next run, or `steps` that are spaced in sigma."""
        table, last = sigmas_of(self.alphas_cumprod), self._final_sigma()
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
        spaced = self._spaced(table[::-1], steps)
        if spaced is not None:
            sigmas, timesteps = spaced, sigma_to_t(spaced, np.log(table))
            if any(getattr(self, name) for name in self.rounds):
                timesteps = timesteps.round()
            last = self._last_of_spaced(sigmas)
        self.sigmas = torch.from_numpy(np.concatenate([sigmas, [last]]).astype(np.float32))
        self.timesteps = torch.from_numpy(timesteps).to(device=device, dtype=torch.int64)
        self.num_inference_steps = len(timesteps)
        self._forget()

    def _last_of_spaced(self, sigmas: np.ndarray) -> Any:
        return self._final_sigma()

    def _spread(self, steps: int, end: int) -> np.ndarray:
        """N timesteps below `end`, descending int64, so that one more would be timestep 0."""
        if self.timestep_spacing == "linspace":
            return np.linspace(0, end - 1, steps + 1).round()[::-1][:-1].astype(np.int64)
        if self.timestep_spacing == "leading":
            return (np.arange(steps + 1) * (end // (steps + 1)))[::-1][:-1].astype(np.int64) + self.steps_offset
        return np.arange(end, 0, -self.num_train_timesteps / steps).round().astype(np.int64) - 1

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The index of a timestep in `timesteps`; of one that is not there, the last, as in diffusers."""
        among = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return len(among) - 1 if not (among == timestep).any() else super().index_for_timestep(timestep, among)

    def _x0(self, output: Tensor, sample: Tensor, at: Level) -> Tensor:
        """Model output -> x0, limited if the configuration says so."""
        x0 = output
        if self.prediction_type == "epsilon":
            x0 = (sample - at.sigma * output) / at.alpha
        elif self.prediction_type == "v_prediction":
            x0 = at.alpha * sample - at.sigma * output
        return self._limit(x0)

    def _eps(self, output: Tensor, sample: Tensor, at: Level) -> Tensor:
        """Model output -> eps."""
        if self.prediction_type == "sample":
            return (sample - at.alpha * output) / at.sigma
        return output if self.prediction_type == "epsilon" else at.alpha * output + at.sigma * sample

    def _limit(self, x0: Tensor) -> Tensor:
        if not self.thresholding:
            return x0
        return equations.dynamic_threshold(x0, self.dynamic_thresholding_ratio, self.sample_max_value)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean samples (B, ...) -> alpha x0 + sigma eps, at some of the scheduler's `timesteps`, () or (B,)."""
        sigma = self._sigmas_at(timesteps, original_samples)
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha * original_samples + (sigma * alpha) * noise
