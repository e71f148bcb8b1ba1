"""A scheduler's arguments as a thing to keep: the read-only `config`, its file, how a bad one is refused.

In: a folder or a dict. Out: `SchedulerConfig`, or a ValueError that names what is wrong. `ddpm.py` and
`ddim.py` are where the walk goes on; this file can be left for later.
"""

from __future__ import annotations

import json
import math
import numbers
import operator
from pathlib import Path
from typing import Any, NoReturn

from minisd.checkpoint.textfiles import write_whole

CONFIG_FILE = "scheduler_config.json"


class SchedulerConfig(dict[str, Any]):
    """A scheduler's arguments, read-only: `config.beta_start`, `config["beta_start"]`, `dict(config)`.

    A dict, because diffusers' `from_config` accepts nothing else: it can be given a minisd config as it is.
    """

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"this config has no {name!r}; it has {', '.join(self)}")

    def _read_only(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("config is read-only: make a changed scheduler with from_config(config, name=value)")

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = __ior__ = _read_only
    update = pop = popitem = clear = setdefault = _read_only

    def __reduce__(self) -> tuple[Any, ...]:  # pickle and deepcopy would otherwise set items one by one
        return SchedulerConfig, (dict(self),)


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write a JSON file all or nothing. Makes the folder if needed."""
    text = json.dumps(config, indent=2, sort_keys=True, default=lambda number: number.item())  # NumPy's
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{text}\n".encode())


# ---------------------------------------------------- saying no


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """ValueError with the argument's name, its value and what it may be, unless `condition`."""
    if not condition:
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def require_one_of(names: tuple[str, ...], name: str, value: object) -> None:
    require(value in names, name, value, "one of " + ", ".join(repr(known) for known in names))


def require_positive(name: str, value: object) -> None:
    require(is_between(value, 0, math.inf), name, value, "a number above 0")


def is_between(value: object, low: float, high: float) -> bool:
    """Whether `value` is a number with low < value <= high. NaN is not, nor is a string."""
    return isinstance(value, numbers.Real) and low < float(value) <= high


def whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    """`value` as an int from `low` to `high`. NumPy integers and one-element integer tensors are fine."""
    allowed = f"a whole number, {low} or more" if high == math.inf else f"a whole number from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: must be {allowed}") from None
    require(low <= number <= high, name, number, allowed)
    return number
