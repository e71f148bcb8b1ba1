"""PNDM: pseudo linear multistep on DDIM's update. The scheduler that SD 1.5's own folder names.

Liu et al. 2022, Pseudo Numerical Methods for Diffusion Models on Manifolds, arXiv:2202.09778. In: the noise prediction.
Out: DDIM's update with an extrapolated noise prediction, from the last four (Adams-Bashforth).
"""

from __future__ import annotations

from collections import deque
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisd.checks import require, require_one_of, whole
from minisd.noise import Generators
from minisd.schedulers import equations
from minisd.schedulers.base import Scheduler, StepResult, check_shapes


@dataclass(eq=False)
class PNDMScheduler(Scheduler):
    """N steps, and one call more to begin with (one timestep stands twice), or Runge-Kutta: 12 calls for the first 3.

    `skip_prk_steps`: begin without Runge-Kutta, as SD 1.5 does. `set_alpha_to_one`: as in DDIM.
    """

    _: KW_ONLY
    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False

    def _check_arguments(self) -> None:
        super()._check_arguments()
        require_one_of(("epsilon", "v_prediction"), "prediction_type", self.prediction_type)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.final_alpha_cumprod = self.one if self.set_alpha_to_one else self.alphas_cumprod[0]
        self._forget(0)

    def _forget(self, prk_calls: int) -> None:
        self.counter, self.prk_calls = 0, prk_calls
        self.ets: deque[Tensor] = deque(maxlen=4)  # the last noise predictions, e_t
        self.cur_sample: Tensor | None = None
        self.cur_model_output: Any = 0

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose N steps: `timesteps` (N + 1,) with `skip_prk_steps`, else (N + 9,), on `device`."""
        steps = whole("num_inference_steps", num_inference_steps, 1, self.num_train_timesteps)
        require(self.skip_prk_steps or steps >= 4, "num_inference_steps", steps, "at least 4 for Runge-Kutta steps")
        spacing = equations.TIMESTEP_SPACINGS[self.timestep_spacing]
        rising = spacing(self.num_train_timesteps, steps, self.steps_offset)[::-1]
        if self.skip_prk_steps:
            prk = np.array([], dtype=np.int64)
            plms = np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])[::-1]
        else:
            half = np.tile(np.array([0, self.num_train_timesteps // steps // 2]), 4)
            prk = (rising[-4:].repeat(2) + half)[:-1].repeat(2)[1:-1][::-1]
            plms = rising[:-3][::-1]
        self.num_inference_steps, self.prk_timesteps = steps, prk
        self.timesteps = torch.from_numpy(np.concatenate([prk, plms]).astype(np.int64)).to(device)
        self._forget(len(prk))

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
        """One call of the method; `model_output` and `sample`: (B, C, H, W). The rest is not used."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is not set: call set_timesteps before step")
        check_shapes(model_output, sample)
        t = whole("timestep", timestep, -1, self.num_train_timesteps - 1)
        x0 = equations.x0_from_output(model_output, sample, self.alphas_cumprod[t], self.prediction_type)
        plan = self._runge_kutta if self.counter < self.prk_calls else self._multistep
        eps, base, t, t_prev = plan(model_output, t, sample)
        self.counter += 1
        return StepResult(self._update(base, eps, t, t_prev), x0)

    def _runge_kutta(self, output: Tensor, t: int, sample: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Four calls make one step of classical Runge-Kutta, all from the same sample (PNDM, eq. 13)."""
        assert self.num_inference_steps is not None
        call = self.counter % 4
        t_prev = t - (0 if call % 2 else self.num_train_timesteps // self.num_inference_steps // 2)
        if call == 0:
            self.ets.append(output)
            self.cur_sample = sample
        if call < 3:
            self.cur_model_output = self.cur_model_output + (1 / 6 if call == 0 else 1 / 3) * output
        else:
            output, self.cur_model_output = self.cur_model_output + 1 / 6 * output, 0
        assert self.cur_sample is not None
        return output, self.cur_sample, int(self.prk_timesteps[self.counter // 4 * 4]), t_prev

    def _multistep(self, output: Tensor, t: int, sample: Tensor) -> tuple[Tensor, Tensor, int, int]:
        """Adams-Bashforth of as many noise predictions as there are; the second call repeats the first step."""
        assert self.num_inference_steps is not None
        stride = self.num_train_timesteps // self.num_inference_steps
        if self.counter == 1 and self.cur_sample is not None:  # the first step again, with the mean of both ends
            base, self.cur_sample = self.cur_sample, None
            return (output + self.ets[-1]) / 2, base, t + stride, t
        self.ets.append(output)
        if self.counter == 0:
            self.cur_sample = sample
        return equations.adams_bashforth(self.ets), sample, t, t - stride

    def _update(self, x: Tensor, output: Tensor, t: int, t_prev: int) -> Tensor:
        """PNDM, eq. 11: DDIM's update, written so that t = t_prev divides nothing by zero."""
        alpha_bar, alpha_bar_prev = self.alphas_cumprod[t], self.alpha_bar(t_prev)
        if self.prediction_type == "v_prediction":
            output = alpha_bar**0.5 * output + (1 - alpha_bar) ** 0.5 * x
        return equations.pndm_update(x, output, alpha_bar, alpha_bar_prev)
