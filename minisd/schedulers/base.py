"""What all schedulers share: the noise schedule, the timesteps of a run, and the forward process.

In: the settings of a `scheduler_config.json`. Out: `betas`, `alphas_cumprod` (alpha_bar of the papers), `timesteps`,
noisy samples for training. The reverse process is `step`, which each scheduler defines: `ddpm.py` and `ddim.py` come
next. Nothing here knows a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisd.checks import check_schedule, require, whole
from minisd.notebook import curve, table
from minisd.schedulers import equations
from minisd.schedulers.settings import Configured

if TYPE_CHECKING:
    pass


class StepResult(NamedTuple):
    """What `step` returns: `result.prev_sample`, `result["prev_sample"]` or `result[0]`, as in diffusers.

    It is a tuple, so that `return_dict=False` changes nothing.
    """

    prev_sample: Tensor  # the sample at the next timestep: the model's next input
    pred_original_sample: Tensor  # the predicted clean sample, x0: a preview of the result

    def __getitem__(self, key: Any) -> Any:
        return self._asdict()[key] if isinstance(key, str) else tuple(self)[key]

    def to_tuple(self) -> tuple[Tensor, ...]:
        return tuple(self)

    def keys(self) -> tuple[str, ...]:
        return self._fields

    def values(self) -> tuple[Tensor, ...]:
        return tuple(self)


@dataclass(eq=False)
class Scheduler(Configured):
    """The noise schedule of a diffusion process, and the timesteps to sample at. Base of all schedulers.

    `num_train_timesteps`      T, the number of training timesteps: 0 (least noise) to T - 1
    `beta_start`, `beta_end`   first and last beta of the schedule, above 0 and below 1
    `beta_schedule`            how beta grows between them: see `equations.BETA_SCHEDULES`
    `trained_betas`            all T betas, instead of the three above
    `prediction_type`          what the model predicts: "epsilon", "sample" (x0) or "v_prediction"
    `timestep_spacing`         how N sampling steps are spaced over T: see `equations.TIMESTEP_SPACINGS`
    `steps_offset`             shift of the "leading" timesteps; 1 for SD 1.5

    Some have `rescale_betas_zero_snr` too, zero terminal SNR: see `equations.rescale_zero_terminal_snr`. Names and
    defaults are diffusers', which are those of DDPM on pixels, not SD 1.5's. The first five may be given by position. A
    bad value raises a ValueError that names it.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | np.ndarray | None = None
    _: KW_ONLY
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0

    beta_schedules: ClassVar[tuple[str, ...]] = ("linear", "scaled_linear", "squaredcos_cap_v2")
    timestep_spacings: ClassVar[tuple[str, ...]] = tuple(equations.TIMESTEP_SPACINGS)
    order: ClassVar[int] = 1  # how often `step` needs the model
    divides_by_alpha_bar: ClassVar[bool] = True  # of the timestep of a step, to predict x0 from epsilon
    init_noise_sigma: ClassVar[float] = 1.0  # standard deviation of the noise that sampling starts from

    def __post_init__(self) -> None:
        if self.trained_betas is not None:
            self.trained_betas = tuple(float(beta) for beta in self.trained_betas)
        self._check_arguments()
        # On the CPU, even if another default device is set: small tables, read one number at a time.
        with torch.device("cpu"):
            self.betas = self._make_betas()  # (T,) float32, and so are the next two
            self.one = torch.tensor(1.0, dtype=torch.float32)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.final_alpha_cumprod = self.one  # the noise level before the first timestep: a clean sample
        self.num_inference_steps: int | None = None
        self.timesteps = torch.from_numpy(np.arange(self.num_train_timesteps)[::-1].copy())

    def _check_arguments(self) -> None:
        arguments = {name: getattr(self, name) for name in self._arguments()}
        check_schedule(arguments, self.beta_schedules, self.timestep_spacings)
        self.num_train_timesteps, self.steps_offset = int(self.num_train_timesteps), int(self.steps_offset)

    def _repr_html_(self) -> str:
        """In a notebook: the settings, and alpha-bar over the timesteps with those that are visited."""
        marks = [int(t) for t in self.timesteps.flatten().tolist()[:200]] if self.num_inference_steps else []
        inside = sorted({min(max(mark, 0), self.num_train_timesteps - 1) for mark in marks})
        settings = {name: value for name, value in self.config.items() if not name.startswith("_")}
        return table(type(self).__name__, settings, after=curve(self.alphas_cumprod.tolist(), inside))

    # ------------------------------------------------ noise levels

    def _make_betas(self) -> Tensor:
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float32)
        else:
            schedule = equations.BETA_SCHEDULES[self.beta_schedule]
            betas = schedule(self.beta_start, self.beta_end, self.num_train_timesteps)
        rescale = getattr(self, "rescale_betas_zero_snr", False)
        return equations.rescale_zero_terminal_snr(betas) if rescale else betas

    def alpha_bar(self, timestep: int) -> Tensor:
        """alpha_bar at a timestep, 0-dim float32; at a negative timestep `final_alpha_cumprod`."""
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod

    # ------------------------------------------------ timesteps

    def __len__(self) -> int:
        return self.num_train_timesteps

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Choose the timesteps of N = `num_inference_steps` steps: `timesteps` is (N,) int64 on `device`.

        Raises ValueError unless N is a whole number from 1 to `num_train_timesteps`.
        """
        steps = whole("num_inference_steps", num_inference_steps, 1, self.num_train_timesteps)
        spacing = equations.TIMESTEP_SPACINGS[self.timestep_spacing]
        timesteps = spacing(self.num_train_timesteps, steps, self.steps_offset)
        if -1 in timesteps:
            problem = f"trailing spacing rounds {steps} steps to {len(timesteps)}, the last at timestep -1"
            warnings.warn(f"{problem}: bad results, as in diffusers. Take a step more or less", stacklevel=2)
        self.num_inference_steps = steps
        self.timesteps = torch.from_numpy(timesteps.copy()).to(device)

    def _locate(self, timestep: Any) -> int:
        """The timestep of a `step` call as an int, 0 to T - 1.

        Or -1, if "trailing" has produced it: that reads the table's last entry, the noisiest, by accident of
        indexing. diffusers does so (see `equations.trailing_timesteps`).
        """
        low = -1 if -1 in self.timesteps.tolist() else 0
        t = whole("timestep", timestep, low, self.num_train_timesteps - 1)
        if self.divides_by_alpha_bar and self.prediction_type == "epsilon" and self.alphas_cumprod[t] == 0:
            problem = f"zero terminal SNR: epsilon prediction divides by zero at timestep {t}"
            warnings.warn(f"{problem}, as in diffusers. Take a model that predicts v", stacklevel=3)
        return t

    def _two_timesteps(self, timestep: Any) -> tuple[int, int]:
        """t and the previous timestep of the DDIM schedulers, t - T // N.

        With "leading" spacing that is the next timestep of the run. With "linspace" it is not, nor with "trailing"
        where N does not divide T (10 of 30 steps): `step` then returns a sample at another noise level than the one
        that the next call assumes. diffusers has the mistake, and equal numbers are the promise.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is not set: call set_timesteps before step")
        t = self._locate(timestep)
        return t, t - self.num_train_timesteps // self.num_inference_steps

    # ------------------------------------------------ samples

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say at which of `timesteps` the next run starts: where they repeat, a timestep alone does not."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """`sample` unchanged. Schedulers that work with sigmas scale the model's input: every loop calls this."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process: clean samples (B, ...) -> noisy ones at `timesteps`, () or (B,)."""
        return equations.add_noise(original_samples, noise, self._levels(timesteps, original_samples))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The training target of v-prediction; shapes as in `add_noise`."""
        return equations.velocity(sample, noise, self._levels(timesteps, sample))

    def _levels(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """alpha_bar at `timesteps`, shaped to multiply samples `like`: (B, 1, 1, 1), in their dtype."""
        timesteps = torch.as_tensor(timesteps)
        if timesteps.device.type == "cpu":  # on an accelerator, reading values would make training wait
            low, high = int(timesteps.min()), int(timesteps.max())
            require(0 <= low <= high < len(self), "timesteps", [low, high], f"from 0 to {len(self) - 1}")
        alphas_cumprod = self.alphas_cumprod.to(like.device, like.dtype)
        return alphas_cumprod[timesteps.to(like.device)].reshape(-1, *[1] * (like.ndim - 1))


@dataclass(eq=False)
class ClippingScheduler(Scheduler):
    """Adds the range of samples, and zero terminal SNR.

    `clip_sample`              clip x0 to [-clip_sample_range, clip_sample_range]: for pixels, not latents
    `rescale_betas_zero_snr`   zero terminal SNR: see `equations.rescale_zero_terminal_snr`
    """

    _: KW_ONLY
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    rescale_betas_zero_snr: bool = False

    def _limit(self, x0: Tensor) -> Tensor:
        """x0 clipped to the range of samples, if the configuration says so."""
        return x0.clamp(-self.clip_sample_range, self.clip_sample_range) if self.clip_sample else x0


@dataclass(eq=False)
class ThresholdingScheduler(ClippingScheduler):
    """Adds Imagen's dynamic thresholding, in the place of clipping: see `equations.dynamic_threshold`.

    `thresholding`                 whether to; for models of pixels
    `dynamic_thresholding_ratio`   which quantile of |x0| becomes the image's range, 0 to 1
    `sample_max_value`             the largest such range, above 0
    """

    _: KW_ONLY
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def _limit(self, x0: Tensor) -> Tensor:
        if not self.thresholding:
            return super()._limit(x0)
        return equations.dynamic_threshold(x0, self.dynamic_thresholding_ratio, self.sample_max_value)


def check_shapes(model_output: Tensor, sample: Tensor) -> None:
    """ValueError unless a model's output has the shape of its sample."""
    got, want = tuple(model_output.shape), tuple(sample.shape)
    require(got == want, "model_output.shape", got, f"the shape of sample, {want}")
