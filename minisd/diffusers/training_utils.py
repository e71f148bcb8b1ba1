"""What training scripts take from diffusers besides networks: averaged weights, the signal-to-noise ratio, seeds."""

import copy
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SETTINGS = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


class EMAModel:
    """An exponential moving average of a network's parameters, kept beside it.

    `decay` is the most that is kept of the average in a step, `min_decay` the least; up to `update_after_step` the
    average is the parameters. In between the share grows as (1 + step) / (10 + step) or, with `use_ema_warmup`, as
    1 - (1 + step / inv_gamma) ** -power.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: Any = None,
        model_config: Any = None,
    ) -> None:
        """`model_cls`, `model_config`: for `save_pretrained`. `foreach` has no effect."""
        self.shadow_params = [one.clone().detach() for one in parameters]
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_ema_warmup, self.inv_gamma, self.power = use_ema_warmup, inv_gamma, power
        self.model_cls, self.model_config = model_cls, model_config
        self.optimization_step = 0
        self.cur_decay_value: float | None = None
        self._stored: list[Tensor] | None = None

    def get_decay(self, optimization_step: int) -> float:
        """The share of the average that a step keeps."""
        step = optimization_step - self.update_after_step - 1
        if step <= 0:
            return 0.0
        grown = 1 - (1 + step / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + step) / (10 + step)
        return max(min(grown, self.decay), self.min_decay)

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move the average towards the parameters, after each step of the optimizer. Frozen ones are copied."""
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        for average, one in zip(self.shadow_params, parameters, strict=True):
            if one.requires_grad:
                average.sub_((1 - self.cur_decay_value) * (average - one))
            else:
                average.copy_(one)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Write the average into the parameters."""
        for average, one in zip(self.shadow_params, parameters, strict=True):
            one.copy_(average)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep the parameters aside, before `copy_to`."""
        self._stored = [one.detach().cpu().clone() for one in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Write what `store` kept back. Raises RuntimeError where nothing is kept."""
        if self._stored is None:
            raise RuntimeError("nothing to restore: call store first")
        for kept, one in zip(self._stored, parameters, strict=True):
            one.copy_(kept)
        self._stored = None

    def to(self, device: Any = None, dtype: torch.dtype | None = None, non_blocking: bool = False) -> None:
        """Move the average to a device, a dtype, or both."""
        self.shadow_params = [one.to(device=device, dtype=dtype) for one in self.shadow_params]

    def state_dict(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in SETTINGS}, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the settings and the average that another `state_dict` gave."""
        for name, value in copy.deepcopy(state_dict).items():
            if name not in (*SETTINGS, "shadow_params"):
                raise ValueError(f"{name}: no such setting of an average")
            setattr(self, name, value)

    def save_pretrained(self, path: Any) -> None:
        """Write a network of `model_cls` and `model_config` with the averaged weights."""
        if self.model_cls is None or self.model_config is None:
            raise ValueError("save_pretrained: needs model_cls and model_config")
        model = self.model_cls.from_config(self.model_config)
        self.copy_to(model.parameters())
        model.save_pretrained(path)


def compute_snr(noise_scheduler: Any, timesteps: Tensor) -> Tensor:
    """The signal-to-noise ratio alpha_bar / (1 - alpha_bar) at `timesteps` (B,), (B,) float32 (arXiv:2303.09556)."""
    levels = noise_scheduler.alphas_cumprod.to(timesteps.device)
    alpha, sigma = (levels**0.5)[timesteps].float(), ((1.0 - levels) ** 0.5)[timesteps].float()
    return (alpha / sigma) ** 2


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's randomness."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
