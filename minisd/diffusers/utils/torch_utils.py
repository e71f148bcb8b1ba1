"""`randn_tensor`: noise as diffusers draws it, which is as minisd does."""

import torch
from torch import Tensor

from minisd.noise import Generators, draw_noise


def randn_tensor(
    shape: tuple[int, ...],
    generator: Generators = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Standard normal noise: from one generator, or from a list of one for each sample."""
    place = torch.device("cpu" if device is None else device)
    return draw_noise(torch.Size(shape), generator, place, dtype or torch.get_default_dtype())
