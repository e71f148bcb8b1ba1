"""minisd's schedulers under diffusers' calls: they can come from the hub, and are saved and loaded by `config`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from minisd import schedulers
from minisd.diffusers.loading import NEUTRAL, Source, folder_of_texts
from minisd.diffusers.refusing import accept
from minisd.files import read_json_object
from minisd.schedulers import SchedulerConfig
from minisd.schedulers.settings import CONFIG_FILE

if TYPE_CHECKING:
    from typing import Self


class FromDiffusers(schedulers.Scheduler):
    """What a scheduler of diffusers can do besides stepping: minisd's own know folders only."""

    config_name = CONFIG_FILE
    has_compatibles, _deprecated_kwargs = True, ()

    @property
    def compatibles(self) -> list[type[FromDiffusers]]:
        """The schedulers that can be made from this one's `config`: all of them."""
        return list(KINDS)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Source, subfolder: str | None = None, **overrides: Any
    ) -> Self:
        """A scheduler from a folder or hub repository, or from its `subfolder`; `overrides` win over the file."""
        neutral = {name: overrides.pop(name) for name in NEUTRAL if name in overrides}
        accept(f"{cls.__name__}.from_pretrained", neutral, NEUTRAL, [])
        folder = folder_of_texts(pretrained_model_name_or_path, subfolder)
        return super().from_pretrained(folder, **overrides)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Source, subfolder: str | None = None, **overrides: Any) -> Self:
        """A scheduler from another's `config`, or from that in a folder or hub repository, as `from_pretrained`."""
        if isinstance(config, str | os.PathLike):
            return cls.from_pretrained(config, subfolder, **overrides)
        return super().from_config(config, **overrides)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Source, subfolder: str | None = None) -> dict[str, Any]:
        """The settings in a folder or hub repository, as they stand in the file."""
        return read_json_object(folder_of_texts(pretrained_model_name_or_path, subfolder) / CONFIG_FILE)

    def save_config(self, save_directory: Source) -> None:
        """Write scheduler_config.json into a folder: the same as `save_pretrained`."""
        self.save_pretrained(save_directory)


class DDIMScheduler(FromDiffusers, schedulers.DDIMScheduler):
    """`minisd.DDIMScheduler`."""


class DDPMScheduler(FromDiffusers, schedulers.DDPMScheduler):
    """`minisd.DDPMScheduler`."""


class DDIMInverseScheduler(FromDiffusers, schedulers.DDIMInverseScheduler):
    """`minisd.DDIMInverseScheduler`."""


class PNDMScheduler(FromDiffusers, schedulers.PNDMScheduler):
    """`minisd.schedulers.PNDMScheduler`."""


class LMSDiscreteScheduler(FromDiffusers, schedulers.LMSDiscreteScheduler):
    """`minisd.schedulers.LMSDiscreteScheduler`."""


class EulerDiscreteScheduler(FromDiffusers, schedulers.EulerDiscreteScheduler):
    """`minisd.schedulers.EulerDiscreteScheduler`."""


class EulerAncestralDiscreteScheduler(FromDiffusers, schedulers.EulerAncestralDiscreteScheduler):
    """`minisd.schedulers.EulerAncestralDiscreteScheduler`."""


class HeunDiscreteScheduler(FromDiffusers, schedulers.HeunDiscreteScheduler):
    """`minisd.schedulers.HeunDiscreteScheduler`."""


class DPMSolverMultistepScheduler(FromDiffusers, schedulers.DPMSolverMultistepScheduler):
    """`minisd.schedulers.DPMSolverMultistepScheduler`."""


class UniPCMultistepScheduler(FromDiffusers, schedulers.UniPCMultistepScheduler):
    """`minisd.schedulers.UniPCMultistepScheduler`."""


class LCMScheduler(FromDiffusers, schedulers.LCMScheduler):
    """`minisd.schedulers.LCMScheduler`."""


KINDS: tuple[type[FromDiffusers], ...] = (
    DDIMScheduler, DDPMScheduler, DDIMInverseScheduler, PNDMScheduler, LMSDiscreteScheduler, EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler,
    LCMScheduler,
)  # fmt: skip
SCHEDULERS: dict[str, type[FromDiffusers]] = {kind.__name__: kind for kind in KINDS}


class UncoveredScheduler:
    """Stands where a folder names a scheduler that minisd has not. Its `config` can be read, to make another."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.name, self.config = name, SchedulerConfig(config)

    def __getattr__(self, name: str) -> NoReturn:
        own = self.__dict__.get("name")
        raise AttributeError(
            f"{own}.{name} is not covered by minisd.diffusers, whose schedulers are {', '.join(SCHEDULERS)}: "
            "set pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
