"""A scheduler's arguments, kept: the read-only `config` and its file, `scheduler_config.json`.

Which arguments are possible is checked in `minisd/checks.py`. The walk goes on with `ddpm.py` and `ddim.py`; this file
can be left for later.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from minisd.checks import require
from minisd.files import read_json_object, write_whole

if TYPE_CHECKING:
    from typing_extensions import Self

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


class Configured:
    """Base of the schedulers, which are dataclasses: their arguments, kept, read from a file and written to one."""

    _given: ClassVar[frozenset[str]] = frozenset()  # the arguments that were chosen, by name
    _other_settings: Mapping[str, Any] = MappingProxyType({})  # what `from_config` was given for other schedulers

    def __new__(cls, *args: Any, **given: Any) -> Self:
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))  # as diffusers, which counts those by position not
        return self

    @classmethod
    def _arguments(cls) -> list[str]:
        return [field.name for field in fields(cls)]  # type: ignore[arg-type]

    @property
    def config(self) -> SchedulerConfig:
        """All arguments, and what `from_config` was given for other schedulers.

        `_use_default_values`, as in diffusers, lists the arguments that nobody chose: `from_config` of another class
        takes its own defaults for them.
        """
        own = {name: getattr(self, name) for name in self._arguments()}
        unchosen = [name for name in own if name not in self._given]
        return SchedulerConfig(
            {**own, **self._other_settings, **({"_use_default_values": unchosen} if unchosen else {})}
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """A scheduler from any scheduler's `config`, minisd's or diffusers', or from a dict; `overrides` win.

        What this scheduler does not know has no effect but stays in its `config`, so that DDIM can be made
        from the PNDM configuration of SD 1.5, and DDPM -> DDIM -> DDPM loses nothing. Keys with "_" in front
        are dropped.
        """
        require(isinstance(config, Mapping), "config", config, "a mapping, such as a scheduler's config")
        defaults = set(config.get("_use_default_values", ()))  # another class's, so this one's apply
        chosen = {key: value for key, value in config.items() if key not in defaults and not key.startswith("_")}
        known = inspect.signature(cls).parameters
        scheduler = cls(**{**{key: chosen[key] for key in chosen if key in known}, **overrides})
        scheduler._other_settings = {key: chosen[key] for key in chosen if key not in known}
        return scheduler

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], subfolder: str | None = None, **overrides: Any) -> Self:
        """A scheduler from `folder`/`subfolder`/scheduler_config.json. CheckpointError if that cannot be used."""
        return cls.from_config(read_json_object(Path(folder, subfolder or "", CONFIG_FILE)), **overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder`/scheduler_config.json, which diffusers reads too. Makes the folder if needed."""
        write_config(Path(folder, CONFIG_FILE), {**self.config, "_class_name": type(self).__name__})
