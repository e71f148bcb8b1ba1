"""Numbers that are not finite: every way out of the model is checked, because NaN becomes a black image.

`lab/finite.py` finds where they begin. This file needs the standard library only.
"""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from minisd.sampling import Step

SomeStep = TypeVar("SomeStep", bound="Step")


class NonFiniteWarning(RuntimeWarning):
    """What the model computed holds NaN or infinite numbers: an image made of it is black, or has black parts."""


def check_finite(values: "Tensor", what: str, stacklevel: int = 2) -> bool:
    """Whether all `values` are finite; warns of `what` where not. `stacklevel` counts from the caller."""
    if bool(values.isfinite().all()):
        return True
    way = "`minisd generate --check` finds where they begin; bfloat16 and float32 hold larger numbers than float16"
    warnings.warn(f"{what}: NaN or infinite numbers; {way}", NonFiniteWarning, stacklevel=stacklevel + 1)
    return False


def watched(steps: Iterator[SomeStep]) -> Iterator[SomeStep]:
    """The same steps; warns at the first whose latents are not finite."""
    sound = True
    for step in steps:
        sound = sound and check_finite(step.latents, f"latents of step {step.index + 1} (timestep {step.timestep})")
        yield step
