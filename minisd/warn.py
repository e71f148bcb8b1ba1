"""What a user is told without an error: warnings, and above all that numbers are not finite.

Every way out of the model is checked, because NaN becomes a black image; `lab/finite.py` finds where it begins. This
file needs the standard library only.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
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
    return not tell_first([(what, values.isfinite().all())])


def tell_first(asked: "Iterable[tuple[str, Tensor]]") -> bool:
    """Warn of the first of (what, whether it is finite) that is not; whether there is one."""
    for what, finite in asked:
        if not bool(finite):
            way = "`minisd generate --check` finds where they begin; bfloat16 and float32 hold larger numbers"
            warn(f"{what}: NaN or infinite numbers; {way} than float16", NonFiniteWarning)
            return True
    return False


def watched(steps: Iterator[SomeStep]) -> Iterator[SomeStep]:
    """The same steps; warns of the first whose latents are not finite.

    At once on a CPU; an accelerator would have to wait for each answer, and is asked when the steps end, or are left.
    """
    waiting: list[tuple[str, Tensor]] = []
    told = False
    try:
        for step in steps:
            what = f"latents of step {step.index + 1} (timestep {step.timestep})"
            asked = what, step.latents.isfinite().all()
            if step.latents.device.type == "cpu":
                told = told or tell_first([asked])
            else:
                waiting.append(asked)
            yield step
    finally:
        tell_first(waiting)
