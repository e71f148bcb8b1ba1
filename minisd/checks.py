"""Which settings of a noise schedule are possible: every impossible one is a ValueError with its name and value.

The schedulers check their arguments with it, and `checkpoint/` a file's, so that both refuse the same. Not in the walk.
"""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from minisd.files import shown

MAX_TIMESTEPS = 1_000_000  # a thousand times what anybody trains with: more is a broken file
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # those that every scheduler has
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


def check_schedule(
    settings: Mapping[str, Any],
    beta_schedules: Sequence[str] = BETA_SCHEDULES,
    timestep_spacings: Sequence[str] = TIMESTEP_SPACINGS,
) -> None:
    """Raise ValueError, with the name of the setting, for a noise schedule that is impossible.

    `settings`: a scheduler's arguments under diffusers' names, or some of them: what is absent has its default.
    """
    steps = whole("num_train_timesteps", settings.get("num_train_timesteps", 1000), 1, MAX_TIMESTEPS)
    whole("steps_offset", settings.get("steps_offset", 0), 0, MAX_TIMESTEPS)
    require_one_of(PREDICTION_TYPES, "prediction_type", settings.get("prediction_type", "epsilon"))
    require_one_of(timestep_spacings, "timestep_spacing", settings.get("timestep_spacing", timestep_spacings[0]))
    for name in ("clip_sample_range", "sample_max_value"):
        require_positive(name, settings.get(name, 1.0))
    ratio = settings.get("dynamic_thresholding_ratio", 0.995)
    require(ratio == 0 or is_between(ratio, 0, 1), "dynamic_thresholding_ratio", ratio, "a number from 0 to 1")
    if settings.get("trained_betas") is None:
        require_one_of(beta_schedules, "beta_schedule", settings.get("beta_schedule", "linear"))
        for name in ("beta_start", "beta_end"):
            value = settings.get(name, 0.01)
            require(is_between(value, 0, 1) and value < 1, name, value, "a number above 0 and below 1")
    else:
        check_betas(settings["trained_betas"], steps)
    rescaled = settings.get("rescale_betas_zero_snr")
    require(steps > 1 or not rescaled, "rescale_betas_zero_snr", rescaled, "False for a schedule of one timestep")


def check_betas(betas: Any, steps: int) -> None:
    """Raise ValueError unless `betas` are as many numbers as there are training timesteps, all possible."""
    require(hasattr(betas, "__len__") and not isinstance(betas, str), "trained_betas", betas, "a list of numbers")
    require(len(betas) == steps, "len(trained_betas)", len(betas), f"num_train_timesteps, {steps}")
    for index, beta in enumerate(betas):  # a beta of 1 is possible: zero terminal SNR ends with it
        require(is_between(beta, 0, 1), f"trained_betas[{index}]", beta, "above 0 and at most 1")


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """ValueError with the setting's name, its value and what it may be, unless `condition`."""
    if not condition:
        raise ValueError(f"{name}={shown(repr(value))}: must be {allowed}")


def require_one_of(names: Sequence[str], name: str, value: object) -> None:
    """ValueError unless `value` is one of `names`."""
    require(value in names, name, value, "one of " + ", ".join(repr(known) for known in names))


def require_positive(name: str, value: object) -> None:
    """ValueError unless `value` is a number above 0."""
    require(is_between(value, 0, math.inf), name, value, "a number above 0")


def is_between(value: object, low: float, high: float) -> bool:
    """Whether `value` is a number with low < value <= high. NaN is not, nor is a string."""
    try:
        return isinstance(value, numbers.Real) and low < float(value) <= high
    except OverflowError:  # a whole number of hundreds of digits
        return False


def whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    """`value` as an int from `low` to `high`. NumPy integers and integer tensors of one element are accepted."""
    allowed = f"a whole number, {low} or more" if high == math.inf else f"a whole number from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={shown(repr(value))}: must be {allowed}") from None
    require(low <= number <= high, name, number, allowed)
    return number
