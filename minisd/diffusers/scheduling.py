"""What stands between a pipeline and its scheduler: files that name one, corrections, schedules of a program's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minisd.diffusers.schedulers import SCHEDULERS, UncoveredScheduler
from minisd.files import read_json_object
from minisd.schedulers import Scheduler, SchedulerConfig, StepResult


class LoopScheduler:
    """A scheduler, minisd's or of another make, as the sampling loop calls it.

    `custom`: the arguments of `set_timesteps` where a program chose timesteps or sigmas itself.
    """

    def __init__(self, scheduler: Any, custom: Mapping[str, Any]) -> None:
        self.scheduler, self.custom = scheduler, custom

    def __len__(self) -> int:
        return len(self.scheduler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def set_timesteps(self, steps: int, device: Any = None) -> None:
        self.scheduler.set_timesteps(device=device, **(self.custom or {"num_inference_steps": steps}))

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **given: Any) -> Any:
        if isinstance(self.scheduler, Scheduler):
            return self.scheduler.step(model_output, timestep, sample, **given)  # type: ignore[attr-defined]
        arguments = step_arguments(self.scheduler, **given)
        result = self.scheduler.step(model_output, timestep, sample, **arguments)
        return StepResult(result.prev_sample, getattr(result, "pred_original_sample", result.prev_sample))


def own_schedule(scheduler: Any, timesteps: Any, sigmas: Any) -> dict[str, Any]:
    """The arguments of `set_timesteps` for a schedule that a program chose; none where it chose none.

    Raises ValueError for both at once, and for what this scheduler does not take.
    """
    chosen = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    if len(chosen) > 1:
        raise ValueError("timesteps and sigmas: give one of the two")
    for name in chosen:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{name}: {type(scheduler).__name__}.set_timesteps takes none")
    return chosen


def step_arguments(scheduler: Any, **given: Any) -> dict[str, Any]:
    """Of the arguments given, those that this scheduler's `step` takes."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in given.items() if name in known}


def make_scheduler(name: str, config: Mapping[str, Any]) -> Scheduler | UncoveredScheduler:
    """The scheduler that a folder names, or something that stands in its place until a program assigns another."""
    if name in SCHEDULERS:
        return SCHEDULERS[name].from_config(config)
    return UncoveredScheduler(name, {key: value for key, value in config.items() if not key.startswith("_")})


def folder_scheduler(folder: Path) -> Scheduler | UncoveredScheduler:
    """Of the two files that name it, model_index.json decides in diffusers."""
    config = read_json_object(folder / "scheduler" / "scheduler_config.json")
    index = folder / "model_index.json"
    entry = read_json_object(index).get("scheduler") if index.exists() else None
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else config.get("_class_name")
    return make_scheduler(str(name), config)


def correct(scheduler: Any, corrections: Mapping[str, Any]) -> None:
    """Set what diffusers sets on a pipeline's scheduler, where it says otherwise."""
    if scheduler is None:
        return
    wrong = {key: value for key, value in corrections.items() if scheduler.config.get(key, value) != value}
    if isinstance(scheduler, UncoveredScheduler):
        scheduler.config = SchedulerConfig({**scheduler.config, **wrong})
    elif isinstance(scheduler, Scheduler):
        for key, value in wrong.items():
            setattr(scheduler, key, value)
    elif wrong and hasattr(scheduler, "_internal_dict"):  # diffusers' own
        scheduler._internal_dict = type(scheduler.config)({**scheduler.config, **wrong})
