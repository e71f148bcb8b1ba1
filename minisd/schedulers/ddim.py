"""DDIM: few steps, and a road that can be walked both ways.

In: the model's output at a timestep and the sample it was for. Out: the sample at the next timestep, and the
clean one the model sees behind it. `DDIMScheduler` walks from noise to a picture, `DDIMInverseScheduler` back
from a picture to the noise that it would come from, which is how real pictures are edited. This is the end of
the schedulers' walk; next: `vae.py`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minisd.noise import Generators, draw_noise
from minisd.schedulers import equations
from minisd.schedulers.base import Scheduler, StepResult, ThresholdingScheduler, check_shapes
from minisd.schedulers.settings import is_between, require


@dataclass(eq=False)
class DDIMScheduler(ThresholdingScheduler):
    """Implicit sampling, DDIM, eq. 12: split x_t into x0 and noise, put them together at a lower noise level.

    All arguments of `Scheduler` and `ThresholdingScheduler`, and `set_alpha_to_one`: whether the last step
    ends at a clean sample (alpha_bar 1) or, as for SD 1.5, at the noise level of timestep 0.
    """

    _: KW_ONLY
    set_alpha_to_one: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.final_alpha_cumprod = self.one if self.set_alpha_to_one else self.alphas_cumprod[0]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepResult:
        """One step of eq. 12: from x_t to the timestep T // N below.

        `model_output` and `sample`: (B, C, H, W). `eta`: how random, from 0 (not at all: DDIM) to 1 (DDPM).
        If eta > 0, noise comes from `generator` (one, or a list of one per sample), unless given as
        `variance_noise`. With `use_clipped_model_output` the noise is recomputed to match an x0 that was
        clipped. Raises ValueError for anything that does not fit.
        """
        check_shapes(model_output, sample)
        require(eta == 0 or is_between(eta, 0, float("inf")), "eta", eta, "a number, at least 0")
        if variance_noise is not None and generator is not None:
            raise ValueError("variance_noise and generator: give one of the two, the noise or where it comes from")
        t, t_prev = self._two_timesteps(timestep)
        alpha_bar, alpha_bar_prev = self.alphas_cumprod[t], self.alpha_bar(t_prev)

        x0 = equations.x0_from_output(model_output, sample, alpha_bar, self.prediction_type)
        eps = equations.eps_from_output(model_output, sample, alpha_bar, self.prediction_type)
        x0 = self._limit(x0)
        if use_clipped_model_output:
            eps = equations.eps_from_x0(x0, sample, alpha_bar)

        sigma = eta * equations.posterior_variance(alpha_bar, alpha_bar_prev) ** 0.5  # eq. 16
        prev_sample = equations.ddim_update(x0, eps, alpha_bar_prev, sigma)
        if eta > 0:
            if variance_noise is None:
                variance_noise = draw_noise(sample.shape, generator, model_output.device, model_output.dtype)
            prev_sample = prev_sample + sigma * variance_noise

        return StepResult(prev_sample, x0)


@dataclass(eq=False)
class DDIMInverseScheduler(Scheduler):
    """DDIM with time reversed: from a picture, step by step, to the noise that DDIM would make it from.

    DDIM's steps are those of an ordinary differential equation (section 4.3), and those can be run backwards.
    Exact only if the model answered the same at both ends of a step, so: nearly, with many steps. `timesteps`
    ascend.

    All arguments of `Scheduler`, and `set_alpha_to_one`: whether the walk starts from a clean sample or from
    the noise level of timestep 0; `set_alpha_to_zero` is its former name. "linspace" is not offered, as
    diffusers has none.
    """

    _: KW_ONLY
    set_alpha_to_one: bool = True
    set_alpha_to_zero: InitVar[bool | None] = None

    timestep_spacings: ClassVar[tuple[str, ...]] = ("leading", "trailing")

    def __post_init__(self, set_alpha_to_zero: bool | None) -> None:
        super().__post_init__()
        if set_alpha_to_zero is not None:
            self.set_alpha_to_one = set_alpha_to_zero
        self.final_alpha_cumprod = self.one if self.set_alpha_to_one else self.alphas_cumprod[0]
        self.timesteps = self.timesteps.flip(0)

    @property
    def initial_alpha_cumprod(self) -> Tensor:
        """The noise level before the first timestep, under the name it has where time runs up."""
        return self.final_alpha_cumprod

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """The timesteps of `DDIMScheduler` in ascending order, into `timesteps`: (N,) int64, on `device`."""
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = self.timesteps.flip(0)

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
        """One step up: to the noise level of `timestep`, from the one T // N below, where `sample` is.

        `prev_sample` of the result is, as always, the next input of the model: here the noisier one.
        """
        check_shapes(model_output, sample)
        t_noisier, t = self._two_timesteps(timestep)
        alpha_bar, alpha_bar_noisier = self.alpha_bar(t), self.alphas_cumprod[t_noisier]

        x0 = equations.x0_from_output(model_output, sample, alpha_bar, self.prediction_type)
        eps = equations.eps_from_output(model_output, sample, alpha_bar, self.prediction_type)
        x0 = self._limit(x0)
        prev_sample = equations.ddim_update(x0, eps, alpha_bar_noisier, sigma=0.0)

        return StepResult(prev_sample, x0)
