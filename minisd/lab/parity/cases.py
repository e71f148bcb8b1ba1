"""The input on which two sides are compared.

Real prompts in a batch of two, an image that is not square, and two scales of noise: at 1 an epsilon of 1e-5 instead
of 1e-6 moves the result by a few millionths, at 0.01 by some percent.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

SMALL_SCALE = 0.01
LARGE = 32  # latents a side: models from here on take minutes in float64


@dataclass(frozen=True)
class Case:
    """All that a run depends on beside the model."""

    prompts: tuple[str, ...] = ("a red heart on a blue background", "a photograph of an astronaut riding a horse")
    negatives: tuple[str, ...] = ("blurry", "")
    steps: int = 3
    guidance: float = 5.0
    height: int = 64  # pixels
    width: int = 96
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "prompts": list(self.prompts), "negatives": list(self.negatives)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Case":
        """Raises ValueError for anything that is not a case."""
        if not isinstance(values, Mapping):
            raise ValueError(f"a {type(values).__name__} is not a case")
        try:
            known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
            for name in ("prompts", "negatives"):
                if name in known:
                    known[name] = tuple(str(text) for text in known[name])
            case = cls(**known)
            if len(case.prompts) != len(case.negatives) or min(case.steps, case.height, case.width) < 1:
                raise ValueError("prompts and negatives are not as many, or a size is not positive")
        except TypeError as error:
            raise ValueError(f"not a case: {error}") from None
        return case

    @classmethod
    def fitting(cls, sample_size: int, factor: int, **changes: Any) -> "Case":
        """A case for a model of this size of latents: 8 x 12 of them; 16 x 24, but one prompt and two steps, if large.

        One prompt still makes a batch of two in the UNet, the halves of guidance.
        """
        large = sample_size >= LARGE
        height = (16 if large else 8) * factor
        less = {"prompts": cls.prompts[1:], "negatives": cls.negatives[:1], "steps": 2} if large else {}
        return cls(**{"height": height, "width": height * 3 // 2, **less, **changes})

    def noise(self, *shape: int, offset: int = 0) -> Tensor:
        """Standard normal numbers, float32, the same on every machine."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed + offset))

    def latents(self, channels: int, factor: int) -> Tensor:
        """The noise that both sides start from, (B, channels, height / factor, width / factor)."""
        return self.noise(len(self.prompts), channels, self.height // factor, self.width // factor)

    def images(self, channels: int = 3) -> Tensor:
        """An image of noise, (1, channels, height, width) in [-1, 1]."""
        return self.noise(1, channels, self.height, self.width, offset=1).clamp(-1, 1)
