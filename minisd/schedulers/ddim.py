"""DDIM: deterministic, invertible sampling in few steps.

In: the model's output at a timestep and its sample. Out: the sample at the previous timestep and the predicted clean
sample. `DDIMScheduler` samples; `DDIMInverseScheduler` runs the same steps in reverse, from an image to the noise that
generates it, which is how real images are edited. The schedulers' walk ends here; next: `vae.py`.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minisd.checks import is_between, require
from minisd.noise import Generators, draw_noise
from minisd.schedulers import equations
from minisd.schedulers.base import ClippingScheduler, StepResult, ThresholdingScheduler, check_shapes


@dataclass(eq=False)
class DDIMScheduler(ThresholdingScheduler):
    """Denoising diffusion implicit models, DDIM, eq. 12: predict x0 and eps, combine them at a lower noise level.

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
        """One step of eq. 12: from x_t to x at t - T // N.

        `model_output` and `sample`: (B, C, H, W). `eta`: from 0 (deterministic: DDIM) to 1 (as random as DDPM). If
        eta > 0, noise is drawn from `generator` (one, or a list of one per sample), unless given as `variance_noise`.
        With `use_clipped_model_output` eps is recomputed from the clipped x0. Raises ValueError for arguments that do
        not fit.
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
class DDIMInverseScheduler(ClippingScheduler):
    """DDIM inversion: from an image to the noise from which DDIM generates it. `timesteps` ascend.

    DDIM's steps integrate an ordinary differential equation (section 4.3), which can be integrated in reverse. Exact
    only if the model's output were the same at both ends of a step: the error falls with the number of steps.

    All arguments of `ClippingScheduler`, and `set_alpha_to_one`: whether inversion starts from a clean sample
    (alpha_bar 1) or from the noise level of timestep 0; `set_alpha_to_zero` is its former name. "linspace" is refused,
    as diffusers has none.
    """

    _: KW_ONLY
    set_alpha_to_one: bool = True
    set_alpha_to_zero: InitVar[bool | None] = None

    timestep_spacings: ClassVar[tuple[str, ...]] = ("leading", "trailing")
    divides_by_alpha_bar: ClassVar[bool] = False  # but of the timestep below, which is never pure noise

    def __post_init__(self, set_alpha_to_zero: bool | None) -> None:
        super().__post_init__()
        if set_alpha_to_zero is not None:
            self.set_alpha_to_one = set_alpha_to_zero
        self.final_alpha_cumprod = self.one if self.set_alpha_to_one else self.alphas_cumprod[0]
        self.timesteps = self.timesteps.flip(0)

    @property
    def initial_alpha_cumprod(self) -> Tensor:
        """alpha_bar before the first timestep, under diffusers' name of it in this class."""
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
        """One step of inversion: from `sample` at t - T // N to the noise level of `timestep`, t.

        `prev_sample` of the result is the model's next input, here the noisier one. `eta` and `generator` are not used:
        inversion is deterministic.
        """
        check_shapes(model_output, sample)
        t_noisier, t = self._two_timesteps(timestep)
        alpha_bar, alpha_bar_noisier = self.alpha_bar(t), self.alphas_cumprod[t_noisier]

        x0 = equations.x0_from_output(model_output, sample, alpha_bar, self.prediction_type)
        eps = equations.eps_from_output(model_output, sample, alpha_bar, self.prediction_type)
        x0 = self._limit(x0)
        prev_sample = equations.ddim_update(x0, eps, alpha_bar_noisier, sigma=0.0)

        return StepResult(prev_sample, x0)
