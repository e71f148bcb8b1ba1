"""Learning rate schedules by name, as training scripts get them: `get_scheduler("cosine", optimizer, ...)`."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

NEED_TRAINING_STEPS = ("linear", "cosine", "cosine_with_restarts", "polynomial")
NAMES = ("constant", "constant_with_warmup", "piecewise_constant", *NEED_TRAINING_STEPS)
LAST_OF_POLYNOMIAL = 1e-7  # the learning rate where a polynomial ends


def get_scheduler(
    name: str,
    optimizer: Optimizer,
    step_rules: str | None = None,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    num_cycles: int = 1,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """The schedule `name` over an optimizer's own learning rate, of which it is a factor at each step.

    All but "constant" and "piecewise_constant" rise from 0 during `num_warmup_steps` and need them; those that fall to
    the end of training need `num_training_steps`. `num_cycles` is for "cosine_with_restarts", `power` for "polynomial",
    `step_rules` ("1:10,0.1:20,0.01") for "piecewise_constant". Raises ValueError for another name and for what is
    missing.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(NAMES)}")
    if name == "constant":
        return LambdaLR(optimizer, lambda step: 1.0, last_epoch)
    if name == "piecewise_constant":
        return LambdaLR(optimizer, piecewise(step_rules or ""), last_epoch)
    if num_warmup_steps is None or (num_training_steps is None and name in NEED_TRAINING_STEPS):
        missing = "num_warmup_steps" if num_warmup_steps is None else "num_training_steps"
        raise ValueError(f"{name} needs {missing}")
    warmup, total = num_warmup_steps, num_training_steps or 0
    if name == "polynomial":
        after = polynomial(optimizer.defaults["lr"], power, warmup, total)
    else:
        factor: Callable[[float, float], float] = FALLS.get(name, lambda progress, cycles: 1.0)
        span = max(1, total - warmup)

        def after(step: int) -> float:
            progress = (total - step if name == "linear" else step - warmup) / span
            return factor(progress, num_cycles)

    return LambdaLR(optimizer, lambda step: step / max(1, warmup) if step < warmup else after(step), last_epoch)


def cosine(progress: float, cycles: int) -> float:
    """Half a wave from 1 to 0."""
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def restarts(progress: float, cycles: int) -> float:
    """`cycles` times from 1 to 0."""
    return 0.0 if progress >= 1 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0))))


# The factor after the warm-up, by how much of the training is done; of "linear", by how much is left.
FALLS: dict[str, Callable[[float, int], float]] = {
    "linear": lambda left, cycles: max(0.0, left),
    "cosine": cosine,
    "cosine_with_restarts": restarts,
}


def polynomial(first: float, power: float, warmup: int, total: int) -> Callable[[int], float]:
    """From `first` to the last learning rate, as a factor of `first`."""
    last = LAST_OF_POLYNOMIAL
    if not first > last:
        raise ValueError(f"polynomial ends at {last}: the optimizer's learning rate {first} must be above")

    def factor(step: int) -> float:
        if step > total:
            return last / first
        return ((first - last) * (1 - (step - warmup) / (total - warmup)) ** power + last) / first

    return factor


def piecewise(rules: str) -> Callable[[int], float]:
    """ "1:10,0.1:20,0.01": 1 for the first 10 steps, 0.1 up to step 20, then 0.01."""
    *pieces, last = rules.split(",")
    ends = sorted((int(end), float(value)) for value, end in (piece.split(":") for piece in pieces))
    return lambda step: next((value for end, value in ends if step < end), float(last))
