"""The equations of diffusion models, one pure function each: beta schedules; epsilon / x0 / v conversions; the steps.

In: alpha_bar (0-dim or broadcastable float32 tensors), samples and model outputs. Out: tensors. Nothing here knows a
network, a configuration or a random generator. Next in the walk: `base.py`, which holds the noise schedule.

The letters of the papers, used throughout:

    x            a noisy sample x_t, shape (B, C, H, W)
    x0           the clean sample, or the model's prediction of it
    eps          the noise: standard normal, same shape
    v            the velocity, sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
    alpha_bar    the signal's variance: x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, between 0 and 1
    beta         the variance of the noise that one step adds: alpha_bar is the cumulative product of 1 - beta

Two rules keep every result equal to diffusers', bit for bit. Noise levels stay 0-dim float32 tensors: a
Python float is a double, and would round elsewhere. And the order of operations is part of the interface: (a
* b) / c is not a * (b / c).

    DDPM      Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239
    DDIM      Song et al. 2021, Denoising Diffusion Implicit Models, arXiv:2010.02502
    Improved  Nichol & Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672
    v         Salimans & Ho 2022, Progressive Distillation for Fast Sampling, arXiv:2202.00512
    Imagen    Saharia et al. 2022, Photorealistic Text-to-Image Diffusion Models, arXiv:2205.11487
    Zero-SNR  Lin et al. 2023, Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv:2305.08891
    Laplace   Hang et al. 2024, Improved Noise Schedule for Diffusion Training, arXiv:2407.03297
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# ---------------------------------------------------- beta schedules


def linear_betas(start: float, end: float, steps: int) -> Tensor:
    """DDPM's schedule (section 4): equal increments of beta. Returns (steps,) float32."""
    return torch.linspace(start, end, steps, dtype=torch.float32)


def scaled_linear_betas(start: float, end: float, steps: int) -> Tensor:
    """Latent diffusion's schedule, and SD 1.5's: equal increments of sqrt(beta). Returns (steps,) float32."""
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2


def sigmoid_betas(start: float, end: float, steps: int) -> Tensor:
    """GeoDiff's schedule (arXiv:2203.02923): beta rises fastest in the middle. Returns (steps,) float32."""
    return torch.sigmoid(torch.linspace(-6, 6, steps, dtype=torch.float32)) * (end - start) + start


def cosine_betas(start: float, end: float, steps: int) -> Tensor:
    """Betas of `cosine_alpha_bar`; `start` and `end` are not used. Returns (steps,) float32."""
    return betas_from_alpha_bar(cosine_alpha_bar, steps)


def laplace_betas(start: float, end: float, steps: int) -> Tensor:
    """Betas of `laplace_alpha_bar`; `start` and `end` are not used. Returns (steps,) float32."""
    return betas_from_alpha_bar(laplace_alpha_bar, steps)


def cosine_alpha_bar(u: float) -> float:
    """Improved, eq. 17, for u = t/T in [0, 1]. Without the offset 0.008 the first betas are too small."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def exp_alpha_bar(u: float) -> float:
    """alpha_bar = e^{-12 u} for u = t/T in [0, 1], which Heun's scheduler may have."""
    return math.exp(u * -12.0)


def laplace_alpha_bar(u: float) -> float:
    """Laplace schedule for u = t/T in [0, 1]: log-SNR is Laplace distributed, with location 0 and scale 1/2.

    The paper has alpha_bar = snr / (1 + snr). The square root is diffusers', and so it is the definition
    here.
    """
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * math.fabs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def betas_from_alpha_bar(alpha_bar: Callable[[float], float], steps: int, max_beta: float = 0.999) -> Tensor:
    """Improved, below eq. 17: beta_t = 1 - alpha_bar(t) / alpha_bar(t - 1), capped below 1."""
    grid = [i / steps for i in range(steps + 1)]
    betas = [min(1 - alpha_bar(end) / alpha_bar(start), max_beta) for start, end in pairwise(grid)]
    return torch.tensor(betas, dtype=torch.float32)


BETA_SCHEDULES: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "squaredcos_cap_v2": cosine_betas,
    "exp": lambda start, end, steps: betas_from_alpha_bar(exp_alpha_bar, steps),
    "sigmoid": sigmoid_betas,
    "laplace": laplace_betas,
}


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Zero-SNR, algorithm 1: shift and scale sqrt(alpha_bar) to 0 at the last timestep, keeping the first.

    Ordinary schedules leave signal at the last timestep (SD 1.5: 7 % of the amplitude), from which a model learns the
    mean brightness of an image, whereas sampling starts from pure noise. With alpha_bar[-1] = 0 epsilon prediction
    divides by zero: such models predict v. `betas`: (T,), T >= 2. Returns (T,).
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()  # sqrt(alpha_bar)
    first, last = root[0], root[-1]
    root = root - last
    root = root * (first / (first - last))

    alpha_bar = root**2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])  # undo the cumulative product
    return 1 - alphas


# ---------------------------------------------------- timestep spacings: N of T timesteps
# Zero-SNR, table 2. All return descending int64 arrays.


def leading_timesteps(train_steps: int, steps: int, offset: int) -> np.ndarray:
    """Every (T // N)-th timestep, `offset` added. Does not start at T - 1: N=30 starts at 957 of 999."""
    return np.arange(steps)[::-1] * (train_steps // steps) + offset


def trailing_timesteps(train_steps: int, steps: int, offset: int) -> np.ndarray:
    """Every (T / N)-th timestep down from T - 1. `offset` is not used.

    T / N is rounded, and for some N (61, 103, 121, ... for T = 1000: 62 values in all) `arange` finds room
    for one timestep more, which becomes -1. diffusers takes that step, and so does minisd.
    """
    return np.round(np.arange(train_steps, 0, -train_steps / steps)).astype(np.int64) - 1


def linspace_timesteps(train_steps: int, steps: int, offset: int) -> np.ndarray:
    """N timesteps evenly from T - 1 down to 0, both ends included. `offset` is not used."""
    return np.linspace(0, train_steps - 1, steps).round()[::-1].astype(np.int64)


TIMESTEP_SPACINGS: dict[str, Callable[[int, int, int], np.ndarray]] = {
    "leading": leading_timesteps,
    "trailing": trailing_timesteps,
    "linspace": linspace_timesteps,
}

# ---------------------------------------------------- the forward process


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """DDPM, eq. 4: x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, for any t at once."""
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * eps


def velocity(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """v, section 4: v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0, the target of a v-predicting model."""
    return alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * x0


# ---------------------------------------------------- epsilon / x0 / v conversions


def x0_from_output(output: Tensor, x: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """Model output -> predicted x0: DDPM, eq. 15 (`add_noise` solved for x0)."""
    if prediction_type == "epsilon":
        return (x - (1 - alpha_bar) ** 0.5 * output) / alpha_bar**0.5
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * output
    return output  # "sample": the model predicts x0 itself


def eps_from_output(output: Tensor, x: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """Model output -> predicted eps, so that x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha_bar**0.5 * output + (1 - alpha_bar) ** 0.5 * x
    return eps_from_x0(output, x, alpha_bar)


def eps_from_x0(x0: Tensor, x: Tensor, alpha_bar: Tensor) -> Tensor:
    """`add_noise` solved for eps."""
    return (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """Imagen, section 2.3: clip each image to its own range [-s, s], then divide by s: it fills [-1, 1].

    s is the `ratio` quantile of |x0| over the image, but at least 1 (then this is plain clipping to [-1, 1])
    and at most `max_value`. x0: (B, ...), one s for each of B.
    """
    flat = x0.flatten(1)
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()  # quantiles exist for float32 and float64 only
    s = torch.quantile(flat.abs(), ratio, dim=1).clamp(min=1, max=max_value)[:, None]  # (B, 1)
    return (flat.clamp(-s, s) / s).reshape(x0.shape).to(x0.dtype)


# ---------------------------------------------------- the reverse process: DDPM


def posterior_mean(x0: Tensor, x: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """DDPM, eq. 7: the mean of the posterior q(x_{t-1} | x_t, x0)."""
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    x0_weight = (alpha_bar_prev**0.5 * beta) / (1 - alpha_bar)
    x_weight = alpha**0.5 * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return x0_weight * x0 + x_weight * x


def posterior_variance(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """The variance that goes with `posterior_mean`: DDPM, eq. 7; also DDIM, eq. 16, squared, for eta = 1."""
    return (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)


def ddpm_noise_scale(
    variance_type: str, alpha_bar: Tensor, alpha_bar_prev: Tensor, predicted: Tensor | None = None
) -> Tensor:
    """The standard deviation of the noise that a DDPM step adds.

    DDPM, section 3.2, has two choices: the posterior's variance ("fixed_small") and beta ("fixed_large").
    Improved, eq. 15: the network predicts a weight between them in log space ("learned_range"; `predicted`: -1 small,
    +1 large; (B, C, H, W)), or the variance itself ("learned").
    """
    # The step to a clean sample adds nothing (variance 0), and a logarithm needs more than that.
    small = torch.clamp(posterior_variance(alpha_bar, alpha_bar_prev), min=1e-20)
    large = 1 - alpha_bar / alpha_bar_prev
    if variance_type == "fixed_small_log":
        return torch.exp(0.5 * torch.log(small))
    if variance_type == "fixed_large":
        return large**0.5
    if variance_type == "fixed_large_log":
        # The root of a negative logarithm is not a number, here as in diffusers. Not to sample with.
        return torch.log(large) ** 0.5
    if variance_type == "learned" and predicted is not None:
        return predicted**0.5
    if variance_type == "learned_range" and predicted is not None:
        fraction = (predicted + 1) / 2
        return torch.exp(0.5 * (fraction * torch.log(large) + (1 - fraction) * torch.log(small)))
    return small**0.5


# ---------------------------------------------------- the reverse process, and its inversion: DDIM


def ddim_update(x0: Tensor, eps: Tensor, alpha_bar_prev: Tensor, sigma: Tensor | float) -> Tensor:
    """DDIM, eq. 12 without its random term: x_prev from the predicted x0 and eps.

    With sigma = 0 the update is deterministic, and the same equation serves sampling and inversion. With sigma > 0 the
    caller adds sigma * noise. At eta = 1 and zero terminal SNR, 1 - alpha_bar_prev - sigma**2 is 0 up to rounding: it
    can be negative and its root NaN at the first step (with SD's betas for N = 10, 20, 25, ...), as in diffusers.
    """
    return alpha_bar_prev**0.5 * x0 + (1 - alpha_bar_prev - sigma**2) ** 0.5 * eps


# ---------------------------------------------------- the reverse process: PNDM


def adams_bashforth(eps: Sequence[Tensor]) -> Tensor:
    """The noise prediction extrapolated over a step from the last 1 to 4, the newest last (PNDM, eq. 12)."""
    e = list(reversed(eps))
    if len(e) == 1:
        return e[0]
    if len(e) == 2:
        return (3 * e[0] - e[1]) / 2
    if len(e) == 3:
        return (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
    return 1 / 24 * (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3])


def pndm_update(x: Tensor, eps: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """PNDM, eq. 11: DDIM's update (sigma = 0) as x plus a difference, after Liu et al. 2022, arXiv:2202.09778."""
    x_weight = (alpha_bar_prev / alpha_bar) ** 0.5
    denominator = alpha_bar * (1 - alpha_bar_prev) ** 0.5 + (alpha_bar * (1 - alpha_bar) * alpha_bar_prev) ** 0.5
    return x_weight * x - (alpha_bar_prev - alpha_bar) * eps / denominator
