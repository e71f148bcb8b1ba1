"""Heun's method in sigma: an Euler step, then the mean of the derivatives at both its ends.

Karras et al. 2022, arXiv:2206.00364, algorithm 1. Two model calls a step, so that timesteps and sigmas stand twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minisd.noise import Generators
from minisd.schedulers.base import StepResult, check_shapes
from minisd.schedulers.sigmas import SigmaScheduler, SpacedSigmas, x0_from_output


@dataclass(eq=False)
class HeunDiscreteScheduler(SpacedSigmas, SigmaScheduler):
    """Second order, two model calls a step; the last step, to sigma 0, is Euler's. `clip_sample`: as in DDIM."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    _: KW_ONLY
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    beta_schedules: ClassVar[tuple[str, ...]] = ("linear", "scaled_linear", "squaredcos_cap_v2", "exp")
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.set_timesteps(self.num_train_timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        num_train_timesteps: int | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Choose N steps, or give their timesteps. All but the first stand twice in `timesteps`: (2N - 1,)."""
        self.num_inference_steps = steps = self._steps(num_inference_steps, timesteps)
        self._use(*self._choose(steps, timesteps), device, final=0.0)
        first, between, last = self.sigmas[:1], self.sigmas[1:-1], self.sigmas[-1:]
        self.sigmas = torch.cat([first, between.repeat_interleave(2), last])
        self.timesteps = torch.cat([self.timesteps[:1], self.timesteps[1:].repeat_interleave(2)])

    def _forget(self) -> None:
        super()._forget()
        self._euler: tuple[Tensor, Tensor, Tensor] | None = None  # sample, derivative and step of the first half

    @property
    def state_in_first_order(self) -> bool:
        """Is the next call the Euler half of a step?"""
        return self._euler is None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        generator: Generators = None,
    ) -> StepResult:
        """Half a step: Euler's, or its correction. `model_output` and `sample`: (B, C, H, W)."""
        check_shapes(model_output, sample)
        index = self._index(timestep)
        sigma = self.sigmas[index]
        x0 = x0_from_output(model_output, sample, sigma, self.prediction_type)
        if self.clip_sample:
            x0 = x0.clamp(-self.clip_sample_range, self.clip_sample_range)
        derivative = (sample - x0) / sigma
        if self._euler is None:
            change = self.sigmas[index + 1] - sigma
            self._euler = (sample, derivative, change)
        else:
            sample, first, change = self._euler
            derivative = (first + derivative) / 2
            self._euler = None
        self.step_index = index + 1
        return StepResult(sample + derivative * change, x0)
