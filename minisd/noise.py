"""All randomness of minisd: standard normal noise, drawn so that a seed means the same image on every device."""

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None  # one for the batch, or one for each image


def draw_noise(shape: torch.Size, generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal noise of `shape`, on `device`.

    A CPU generator draws on the CPU whatever the device, so that one seed means one picture everywhere. A list has one
    generator for each image, whose noise then depends on its own seed only, not on its neighbours in the batch. Raises
    ValueError for too few generators, or for one that lives on another accelerator.
    """
    if isinstance(generator, Sequence) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, Sequence):
        if len(generator) < shape[0]:
            raise ValueError(f"generator: {len(generator)} given; must be one, or one for each of {shape[0]} samples")
        single = torch.Size((1, *shape[1:]))
        return torch.cat([draw_noise(single, own, device, dtype) for own in generator[: shape[0]]])
    source = device if generator is None else generator.device
    if source.type not in ("cpu", device.type):
        raise ValueError(f"generator: it lives on {source}; must be on the CPU or on {device}")
    pinned = source.type == "cpu" and device.type == "cuda"  # from there it is copied while the GPU works
    noise = torch.randn(shape, generator=generator, device=source, dtype=dtype, pin_memory=pinned)
    return noise.to(device, non_blocking=pinned)
