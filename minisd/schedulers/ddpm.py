"""DDPM: ancestral sampling; every step removes noise and adds less of it back.

In: the model's output at a timestep and its sample. Out: the sample at the previous timestep and the predicted clean
sample. This is the process that the model was trained for, and it needs many steps. `ddim.py`, next in the walk, needs
few.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from minisd.checks import require, require_one_of, whole
from minisd.noise import Generators, draw_noise
from minisd.schedulers import equations
from minisd.schedulers.base import StepResult, ThresholdingScheduler, check_shapes

VARIANCE_TYPES = (
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
    "learned",
    "learned_range",
)


@dataclass(eq=False)
class DDPMScheduler(ThresholdingScheduler):
    """Ancestral sampling: x_{t-1} is drawn from the posterior of the Markov chain, DDPM, algorithm 2.

    All arguments of `Scheduler` and `ThresholdingScheduler`, and `variance_type`: the variance of the noise that a step
    adds, see `equations.ddpm_noise_scale`. "learned" and "learned_range" need a model with twice the channels out:
    noise prediction and variance.
    """

    _: KW_ONLY
    variance_type: str = "fixed_small"

    beta_schedules: ClassVar[tuple[str, ...]] = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.custom_timesteps = False

    def _check_arguments(self) -> None:
        super()._check_arguments()
        require_one_of(VARIANCE_TYPES, "variance_type", self.variance_type)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Iterable[int] | None = None,
    ) -> None:
        """Choose N = `num_inference_steps` timesteps, or give them: whole numbers, descending, below T.

        Raises ValueError for both or neither, and for timesteps that are not so.
        """
        if num_inference_steps is not None and timesteps is None:
            super().set_timesteps(num_inference_steps, device)
            self.custom_timesteps = False
            return
        if num_inference_steps is not None or timesteps is None:
            raise ValueError(f"{num_inference_steps=}, {timesteps=}: give one of the two")
        given = [whole("timesteps", t, 0, self.num_train_timesteps - 1) for t in timesteps]
        descending = all(earlier > later for earlier, later in pairwise(given))
        require(bool(given) and descending, "timesteps", given, "one timestep or more, in descending order")
        self.timesteps = torch.tensor(given, dtype=torch.int64).to(device)
        self.custom_timesteps = True

    def previous_timestep(self, timestep: Any) -> int:
        """The timestep after this one in `timesteps`; -1 after the last. Before `set_timesteps`: t - 1."""
        t = self._locate(timestep)
        if not (self.custom_timesteps or self.num_inference_steps):
            return t - 1
        order: list[int] = self.timesteps.tolist()
        require(t in order, "timestep", t, "one of the scheduler's timesteps")
        return [*order, -1][order.index(t) + 1]

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
        """One step of algorithm 2: from x_t to the next timestep in `timesteps`.

        `model_output` and `sample`: (B, C, H, W); with a learned variance `model_output` is (B, 2C, H, W). Noise is
        drawn from `generator`, one or a list of one per sample; `eta` is not used. Raises ValueError for arguments that
        do not fit.
        """
        output, variance = self._split_variance(model_output, sample)
        t = self._locate(timestep)
        alpha_bar, alpha_bar_prev = self.alphas_cumprod[t], self.alpha_bar(self.previous_timestep(t))

        x0 = equations.x0_from_output(output, sample, alpha_bar, self.prediction_type)
        x0 = self._limit(x0)
        mean = equations.posterior_mean(x0, sample, alpha_bar, alpha_bar_prev)
        if t <= 0:  # nothing is random at timestep 0; SD 1.5 ends at 1, so even its last step draws noise
            prev_sample = mean + 0  # turns -0.0 into 0.0, as adding diffusers' zero variance does
        else:
            noise = draw_noise(output.shape, generator, output.device, output.dtype)
            scale = equations.ddpm_noise_scale(self.variance_type, alpha_bar, alpha_bar_prev, variance)
            prev_sample = mean + scale * noise

        return StepResult(prev_sample, x0)

    def _split_variance(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The noise prediction, and the predicted variance if the model has one."""
        if not self.variance_type.startswith("learned"):
            check_shapes(model_output, sample)
            return model_output, None
        channels, doubled = model_output.shape[1], 2 * sample.shape[1]
        allowed = f"a fixed one for a model_output of {channels} channels: learning takes {doubled}"
        require(channels == doubled, "variance_type", self.variance_type, allowed)
        output, variance = torch.split(model_output, sample.shape[1], dim=1)
        check_shapes(output, sample)
        return output, variance
