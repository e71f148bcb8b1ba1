"""Sigma: the same diffusion process with its noise level written as a standard deviation (variance exploding).

In: alpha_bar. Out: sigma = sqrt((1 - alpha_bar) / alpha_bar), the noise in x / sqrt(alpha_bar) = x0 + sigma eps, and
the sigmas of N steps: those of chosen timesteps, or spaced in sigma itself. `SigmaScheduler`, below, is the base of
`euler.py`, `lms.py` and `heun.py`, which integrate dx / dsigma = eps; `exponential.py` integrates in log-SNR.

    Karras    Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minisd.checks import require, require_one_of, whole
from minisd.schedulers import equations
from minisd.schedulers.base import Scheduler

ALMOST_ZERO = 2**-24  # alpha_bar in the place of 0, at zero terminal SNR: sigma would be infinite
FINAL_SIGMAS = ("zero", "sigma_min")


def sigmas_of(alphas_cumprod: Tensor) -> np.ndarray:
    """Karras, table 1: alpha_bar (T,) -> sigma (T,), ascending with the timestep."""
    return (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).numpy()


def sigma_to_t(sigmas: np.ndarray, log_sigmas: np.ndarray) -> np.ndarray:
    """The (fractional) timesteps of sigmas (N,), interpolated in log sigma in the table log_sigmas (T,)."""
    log_sigma = np.log(np.maximum(sigmas, 1e-10))
    below = np.cumsum(log_sigma >= log_sigmas[:, None], axis=0).argmax(axis=0).clip(max=len(log_sigmas) - 2)
    low, high = log_sigmas[below], log_sigmas[below + 1]
    weight = np.clip((low - log_sigma) / (low - high), 0, 1)
    return (1 - weight) * below + weight * (below + 1)


# ---------------------------------------------------- sigmas of N steps, from the largest to the smallest


def karras_sigmas(largest: float, smallest: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Karras, eq. 5: evenly spaced in sigma^(1 / rho), so that small sigmas get more of the steps."""
    ramp = np.linspace(0, 1, steps)
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


def exponential_sigmas(largest: float, smallest: float, steps: int) -> np.ndarray:
    """Evenly spaced in log sigma."""
    return np.exp(np.linspace(math.log(largest), math.log(smallest), steps))


def beta_sigmas(largest: float, smallest: float, steps: int, alpha: float = 0.6, beta: float = 0.6) -> np.ndarray:
    """Quantiles of a Beta distribution: more of the steps at both ends (Lee et al. 2024, arXiv:2407.12173)."""
    quantile = scipy("stats", "use_beta_sigmas").beta.ppf
    levels = 1 - np.linspace(0, 1, steps)
    return np.array([smallest + quantile(level, alpha, beta) * (largest - smallest) for level in levels])


SPACED = {
    "use_karras_sigmas": karras_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
}


def scipy(part: str, what: str) -> Any:
    """A part of SciPy, which only this needs. Raises ValueError where it is not installed."""
    from importlib import import_module

    try:
        return import_module(f"scipy.{part}")
    except ImportError:
        raise ValueError(f"{what}: needs SciPy: pip install scipy") from None


# ---------------------------------------------------- timesteps of N steps, as the sigma schedulers space them


def spaced_timesteps(spacing: str, train_steps: int, steps: int, offset: int) -> np.ndarray:
    """(N,) float32, descending. "linspace" is not rounded here: sigmas are interpolated between timesteps."""
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps, dtype=np.float32)[::-1].copy()
    return equations.TIMESTEP_SPACINGS[spacing](train_steps, steps, offset).astype(np.float32)


# ---------------------------------------------------- conversions of the model's output


def x0_from_output(output: Tensor, x: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """Model output -> predicted x0, for a sample x = x0 + sigma eps."""
    if prediction_type == "epsilon":
        return x - sigma * output
    if prediction_type == "v_prediction":  # v's definition, with alpha_bar = 1 / (sigma^2 + 1)
        return output * (-sigma / (sigma**2 + 1) ** 0.5) + x / (sigma**2 + 1)
    return output


@dataclass(eq=False)
class SteppingScheduler(Scheduler):
    """A scheduler that counts its steps, because it looks at neighbouring steps too.

    Timesteps may repeat or lie between those of training, so that a timestep alone does not say which step it is: it is
    looked up at the first step of a run (the second of equal ones, as diffusers has it), then counted.
    """

    def _forget(self) -> None:
        """Begin a new run: no step was taken, nothing is remembered."""
        self.step_index: int | None = None
        self.begin_index: int | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        self.begin_index = whole("begin_index", begin_index, 0, len(self.timesteps) - 1)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The index of a timestep in `timesteps`. Raises ValueError for one that is not there."""
        among = self.timesteps if schedule_timesteps is None else schedule_timesteps
        places = (among == timestep).nonzero()
        require(len(places) > 0, "timestep", timestep, "one of the scheduler's timesteps")
        return int(places[min(1, len(places) - 1)])

    def _index(self, timestep: Any) -> int:
        if self.step_index is None:
            if isinstance(timestep, Tensor):
                timestep = timestep.to(self.timesteps.device)
            self.step_index = self.index_for_timestep(timestep) if self.begin_index is None else self.begin_index
        return self.step_index

    def _sigmas_at(self, timesteps: Tensor, like: Tensor) -> Tensor:
        """The sigma of each of `timesteps` (B,), shaped to multiply samples `like`."""
        timesteps = torch.as_tensor(timesteps).flatten()
        if self.begin_index is None:
            indices = [self.index_for_timestep(t.to(self.timesteps.device)) for t in timesteps]
        else:
            indices = [self.begin_index if self.step_index is None else self.step_index] * len(timesteps)
        table: Tensor = self.sigmas  # type: ignore[attr-defined]  # (N + 1,), which those below have
        return table.to(like.device, like.dtype)[indices].reshape(-1, *[1] * (like.ndim - 1))

    def _spaced(self, sigmas: np.ndarray, steps: int) -> np.ndarray | None:
        """N sigmas between the ends of `sigmas` (descending), or between `sigma_max` and `sigma_min`, if set."""
        largest, smallest = getattr(self, "sigma_max", None), getattr(self, "sigma_min", None)
        largest = sigmas[0].item() if largest is None else largest
        smallest = sigmas[-1].item() if smallest is None else smallest
        for name, space in SPACED.items():
            if getattr(self, name, False):
                return space(largest, smallest, steps)
        return None

    def _refuse_given(self, name: str, given: Any) -> None:
        for choice in SPACED:
            require(given is None or not getattr(self, choice, False), name, given, f"None with {choice}=True")

    def _final_sigma(self) -> Any:
        """What comes after the last of N sigmas: 0, or that of timestep 0."""
        if getattr(self, "final_sigmas_type", "zero") == "zero":
            return 0
        return ((1 - self.alphas_cumprod[0]) / self.alphas_cumprod[0]) ** 0.5


@dataclass(eq=False)
class SpacedSigmas(SteppingScheduler):
    """Adds the choice of sigmas that are spaced in sigma itself; at most one of the three."""

    _: KW_ONLY
    timestep_spacing: str = "linspace"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False

    def _check_arguments(self) -> None:
        super()._check_arguments()
        chosen = [name for name in SPACED if getattr(self, name)]
        require(len(chosen) <= 1, chosen[-1] if chosen else "", True, f"False beside {chosen[0] if chosen else ''}")
        require_one_of(FINAL_SIGMAS, "final_sigmas_type", getattr(self, "final_sigmas_type", "zero"))


@dataclass(eq=False)
class SigmaScheduler(SteppingScheduler):
    """Base of Euler, LMS and Heun: samples are x0 + sigma eps, and the model's input is scaled to unit variance."""

    _: KW_ONLY
    timestep_spacing: str = "linspace"

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "rescale_betas_zero_snr", False):
            self.alphas_cumprod[-1] = ALMOST_ZERO
        self._use(sigmas_of(self.alphas_cumprod)[::-1], np.arange(self.num_train_timesteps)[::-1], "cpu", final=0)

    @property
    def init_noise_sigma(self) -> Tensor:  # type: ignore[override]
        """The standard deviation of the initial noise. With "leading" the first timestep is not the noisiest, and
        the noise there has the signal's variance besides.
        """
        largest = self.sigmas.max()
        return largest if self.timestep_spacing in ("linspace", "trailing") else (largest**2 + 1) ** 0.5

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """x0 + sigma eps -> unit variance, which the model was trained on: divided by sqrt(sigma^2 + 1)."""
        return sample / ((self.sigmas[self._index(timestep)] ** 2 + 1) ** 0.5)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean samples (B, ...) -> x0 + sigma eps, at some of the scheduler's `timesteps`, () or (B,)."""
        return original_samples + noise * self._sigmas_at(timesteps, original_samples)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The training target of v-prediction at some of the scheduler's `timesteps`, () or (B,)."""
        indices = [self.index_for_timestep(t) for t in torch.as_tensor(timesteps).flatten()]
        alpha_bar = self.alphas_cumprod.to(sample)[indices].reshape(-1, *[1] * (sample.ndim - 1))
        return equations.velocity(sample, noise, alpha_bar)

    def _choose(self, steps: int, given: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """(sigmas, timesteps) of N steps, (N,) each: at spaced or given timesteps, or spaced in sigma."""
        table = sigmas_of(self.alphas_cumprod)
        self._refuse_given("timesteps", given)
        if given is None:
            timesteps = spaced_timesteps(self.timestep_spacing, self.num_train_timesteps, steps, self.steps_offset)
        else:
            timesteps = np.array(given, dtype=np.float32)
        sigmas = np.interp(timesteps, np.arange(len(table)), table)
        spaced = self._spaced(sigmas, steps)
        return (sigmas, timesteps) if spaced is None else (spaced, sigma_to_t(spaced, np.log(table)))

    def _use(self, sigmas: np.ndarray, timesteps: np.ndarray, device: Any, final: Any) -> None:
        """Take these for the next run. `sigmas` (N + 1,) stay on the CPU, where reading one makes no GPU wait."""
        self.sigmas = torch.from_numpy(np.concatenate([sigmas, [final]]).astype(np.float32))
        self.timesteps = torch.from_numpy(timesteps.astype(np.float32)).to(device)
        self._forget()

    def _steps(self, num_inference_steps: Any, *given: Any) -> int:
        """N: asked for, or as many as were given. Raises ValueError for both, or neither."""
        chosen = [one for one in (num_inference_steps, *given) if one is not None]
        require(len(chosen) == 1, "num_inference_steps", num_inference_steps, "the only one given, or else None")
        if num_inference_steps is None:
            return len(chosen[0])
        return whole("num_inference_steps", num_inference_steps, 1, self.num_train_timesteps)


def require_float_timestep(timestep: Any) -> None:
    """Lest somebody passes the index of a step: the schedulers that interpolate have fractional timesteps."""
    whole_number = isinstance(timestep, int | torch.IntTensor | torch.LongTensor)
    require(not whole_number, "timestep", timestep, "one of `scheduler.timesteps`, not an index")
