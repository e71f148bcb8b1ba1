"""What all schedulers share: noise levels, the timesteps to visit, and the way into noise.

In: the numbers of a `scheduler_config.json`. Out: `betas`, `alphas_cumprod` (alpha_bar of the papers),
`timesteps`, and noisy samples for training. The way out of noise is `step`, which each scheduler does in its
own way: `ddpm.py` and `ddim.py` come next. Nothing here loads a model or reaches for a network.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minisd.checkpoint.textfiles import read_json_object
from minisd.schedulers import equations
from minisd.schedulers.settings import (
    CONFIG_FILE,
    SchedulerConfig,
    is_between,
    require,
    require_one_of,
    require_positive,
    whole,
    write_config,
)

if TYPE_CHECKING:
    from typing import Self

MAX_TIMESTEPS = 1_000_000  # a thousand times what anybody trains with: more is a broken file
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class StepResult(NamedTuple):
    """What `step` returns. It is a tuple too, so `return_dict=False` changes nothing."""

    prev_sample: Tensor  # the sample one step on: the model's next input
    pred_original_sample: Tensor  # x0 as the model sees it now: a preview of the result


@dataclass(eq=False)
class Scheduler:
    """The noise levels of a diffusion process, and which of them to visit. Base of all schedulers.

    `num_train_timesteps`      T, the number of timesteps in training; they are 0 (nearly clean) to T - 1
    `beta_start`, `beta_end`   first and last beta of the schedule, above 0 and below 1
    `beta_schedule`            the curve between them: see `equations.BETA_SCHEDULES`
    `trained_betas`            all T betas, instead of the three above
    `prediction_type`          what the model predicts: "epsilon", "sample" (x0) or "v_prediction"
    `clip_sample`              clip x0 to within `clip_sample_range` of 0: for pixels, not latents
    `timestep_spacing`         how N steps spread over T: see `equations.TIMESTEP_SPACINGS`
    `steps_offset`             shift of the "leading" timesteps; 1 for SD 1.5
    `rescale_betas_zero_snr`   make the last timestep pure noise: see `equations.rescale_zero_terminal_snr`

    Names and defaults are diffusers', which are those of DDPM on pixels, not SD 1.5's. The first five may be
    given by position. A bad value raises a ValueError that names it.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | np.ndarray | None = None
    _: KW_ONLY
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    beta_schedules: ClassVar[tuple[str, ...]] = ("linear", "scaled_linear", "squaredcos_cap_v2")
    timestep_spacings: ClassVar[tuple[str, ...]] = tuple(equations.TIMESTEP_SPACINGS)
    order: ClassVar[int] = 1  # how often `step` needs the model
    init_noise_sigma: ClassVar[float] = 1.0  # standard deviation of the noise that sampling starts from

    def __post_init__(self) -> None:
        self._check_arguments()
        # On the CPU, even if another default device is set: small tables, read one number at a time.
        with torch.device("cpu"):
            self.betas = self._make_betas()  # (T,) float32, and so are the next two
            self.one = torch.tensor(1.0, dtype=torch.float32)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.final_alpha_cumprod = self.one  # what stands before the first timestep: a clean sample
        self.num_inference_steps: int | None = None
        self.timesteps = torch.from_numpy(np.arange(self.num_train_timesteps)[::-1].copy())
        self._foreign: dict[str, Any] = {}

    def _check_arguments(self) -> None:
        self.num_train_timesteps = whole("num_train_timesteps", self.num_train_timesteps, 1, MAX_TIMESTEPS)
        self.steps_offset = whole("steps_offset", self.steps_offset, 0, MAX_TIMESTEPS)
        require_one_of(PREDICTION_TYPES, "prediction_type", self.prediction_type)
        require_one_of(self.timestep_spacings, "timestep_spacing", self.timestep_spacing)
        require_positive("clip_sample_range", self.clip_sample_range)

    # ------------------------------------------------ noise levels

    def _make_betas(self) -> Tensor:
        given = self.trained_betas
        betas = self._schedule_betas() if given is None else self._given_betas(given)
        if not self.rescale_betas_zero_snr:
            return betas
        require(len(betas) > 1, "rescale_betas_zero_snr", True, "False for a schedule of one timestep")
        return equations.rescale_zero_terminal_snr(betas)

    def _schedule_betas(self) -> Tensor:
        require_one_of(self.beta_schedules, "beta_schedule", self.beta_schedule)
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            require(is_between(value, 0, 1) and value < 1, name, value, "a number above 0 and below 1")
        schedule = equations.BETA_SCHEDULES[self.beta_schedule]
        return schedule(self.beta_start, self.beta_end, self.num_train_timesteps)

    def _given_betas(self, betas: Iterable[float]) -> Tensor:
        self.trained_betas = betas = tuple(float(beta) for beta in betas)
        length = self.num_train_timesteps
        require(len(betas) == length, "len(trained_betas)", len(betas), f"num_train_timesteps, {length}")
        for index, beta in enumerate(betas):  # a beta of 1 is legal: zero terminal SNR ends with it
            require(is_between(beta, 0, 1), f"trained_betas[{index}]", beta, "above 0 and at most 1")
        return torch.tensor(betas, dtype=torch.float32)

    def alpha_bar(self, timestep: int) -> Tensor:
        """The noise level at a timestep, 0-dim float32; at a negative one, a (nearly) clean sample's."""
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
        return whole("timestep", timestep, low, self.num_train_timesteps - 1)

    def _two_timesteps(self, timestep: Any) -> tuple[int, int]:
        """A timestep and its neighbour one step cleaner, the DDIM schedulers' way: T // N below.

        That is where the next timestep lies for "leading". For "linspace" it does not, nor for "trailing"
        where N does not divide T (10 wrong steps at N=30): a sample is then said to be at one noise level,
        and taken for another. diffusers has the mistake, and the same numbers are the promise.
        """
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps is not set: call set_timesteps before step")
        t = self._locate(timestep)
        return t, t - self.num_train_timesteps // self.num_inference_steps

    # ------------------------------------------------ samples

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """`sample` unchanged. Other schedulers scale what the model sees, so pipelines ask."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean samples (B, ...) made noisy at `timesteps`, () or (B,): the forward process, in one jump."""
        return equations.add_noise(original_samples, noise, self._levels(timesteps, original_samples))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a v-predicting model should say of clean samples noised so: shapes as in `add_noise`."""
        return equations.velocity(sample, noise, self._levels(timesteps, sample))

    def _levels(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """alpha_bar at `timesteps`, shaped to multiply samples `like`: (B, 1, 1, 1), in their dtype."""
        timesteps = torch.as_tensor(timesteps)
        if timesteps.device.type == "cpu":  # to look at values on an accelerator would make training wait
            low, high = int(timesteps.min()), int(timesteps.max())
            require(0 <= low <= high < len(self), "timesteps", [low, high], f"from 0 to {len(self) - 1}")
        alphas_cumprod = self.alphas_cumprod.to(like.device, like.dtype)
        return alphas_cumprod[timesteps.to(like.device)].reshape(-1, *[1] * (like.ndim - 1))

    def _limit(self, x0: Tensor) -> Tensor:
        """x0 brought back to the range that samples can have, if the configuration says so."""
        return x0.clamp(-self.clip_sample_range, self.clip_sample_range) if self.clip_sample else x0

    # ------------------------------------------------ configuration

    @property
    def config(self) -> SchedulerConfig:
        """All arguments, and what `from_config` was given for other schedulers."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return SchedulerConfig({**own, **self._foreign})

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """A scheduler from any scheduler's `config`, minisd's or diffusers', or from a dict; `overrides` win.

        What this scheduler does not know has no effect but stays in its `config`, so that DDIM can be made
        from the PNDM configuration of SD 1.5, and DDPM -> DDIM -> DDPM loses nothing. Keys with "_" in front
        are dropped.
        """
        require(isinstance(config, Mapping), "config", config, "a mapping, such as a scheduler's config")
        # diffusers lists here what its user never chose: those are another class's defaults, so ours apply.
        skip = set(config.get("_use_default_values", ()))
        chosen = {key: value for key, value in config.items() if key not in skip and not key.startswith("_")}
        known = inspect.signature(cls).parameters
        scheduler = cls(**{**{key: chosen[key] for key in chosen if key in known}, **overrides})
        scheduler._foreign = {key: chosen[key] for key in chosen if key not in known}
        return scheduler

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], subfolder: str | None = None, **overrides: Any) -> Self:
        """A scheduler from `folder`/`subfolder`/scheduler_config.json. CheckpointError if that cannot be used."""
        return cls.from_config(read_json_object(Path(folder, subfolder or "", CONFIG_FILE)), **overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder`/scheduler_config.json, which diffusers reads too. Makes the folder if needed."""
        write_config(Path(folder, CONFIG_FILE), {**self.config, "_class_name": type(self).__name__})


@dataclass(eq=False)
class ThresholdingScheduler(Scheduler):
    """Adds Imagen's dynamic thresholding, in the place of clipping: see `equations.dynamic_threshold`.

    `thresholding`                 whether to; for models of pixels
    `dynamic_thresholding_ratio`   which quantile of |x0| becomes the image's range, 0 to 1
    `sample_max_value`             the largest such range, above 0
    """

    _: KW_ONLY
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def _check_arguments(self) -> None:
        super()._check_arguments()
        ratio = self.dynamic_thresholding_ratio
        allowed = ratio == 0 or is_between(ratio, 0, 1)
        require(allowed, "dynamic_thresholding_ratio", ratio, "a number from 0 to 1")
        require_positive("sample_max_value", self.sample_max_value)

    def _limit(self, x0: Tensor) -> Tensor:
        if not self.thresholding:
            return super()._limit(x0)
        return equations.dynamic_threshold(x0, self.dynamic_thresholding_ratio, self.sample_max_value)


def check_shapes(model_output: Tensor, sample: Tensor) -> None:
    """ValueError unless a model's output is as large as the sample it is for."""
    got, want = tuple(model_output.shape), tuple(sample.shape)
    require(got == want, "model_output.shape", got, f"the shape of sample, {want}")
