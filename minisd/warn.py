"""What a user is told without an error: warnings, and above all that numbers are not finite.

Every way out of the model is checked, because NaN becomes a black image; `lab/finite.py` finds where it begins. This
file needs the standard library only.
"""

import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from minisd.sampling import Step

SomeStep = TypeVar("SomeStep", bound="Step")
INSIDE = ("minisd", "torch", "contextlib")


class NonFiniteWarning(RuntimeWarning):
    """What the model computed holds NaN or infinite numbers: an image made of it is black, or has black parts."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's program that led here, however deep inside of minisd that is."""
    level, frame = 1, sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=level)


def check_finite(values: "Tensor", what: str) -> bool:
    """Whether all `values` are finite; warns of `what` where not."""
    if bool(values.isfinite().all()):
        return True
    way = "`minisd generate --check` finds where they begin; bfloat16 and float32 hold larger numbers than float16"
    warn(f"{what}: NaN or infinite numbers; {way}", NonFiniteWarning)
    return False


def watched(steps: Iterator[SomeStep]) -> Iterator[SomeStep]:
    """The same steps; warns at the first whose latents are not finite."""
    sound = True
    for step in steps:
        sound = sound and check_finite(step.latents, f"latents of step {step.index + 1} (timestep {step.timestep})")
        yield step
