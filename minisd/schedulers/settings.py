"""A scheduler's arguments, kept: the read-only `config` and its file, `scheduler_config.json`.

Which arguments are possible is checked in `minisd/config.py`. The walk goes on with `ddpm.py` and `ddim.py`; this file
can be left for later.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from minisd.files import write_whole

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
    stored = {name: value for name, value in config.items() if name != "_use_default_values"}  # as diffusers does
    text = json.dumps(stored, indent=2, sort_keys=True, default=lambda number: number.item())  # NumPy's
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, f"{text}\n".encode())
