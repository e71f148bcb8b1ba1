"""Schedulers by the names that people type: minisd's, A1111's, ComfyUI's and diffusers'.

In: "DPM++ 2M Karras", "euler_a", "DPMSolverMultistepScheduler". Out: a class and its arguments.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

SDE = {"algorithm_type": "sde-dpmsolver++"}

# minisd's name -> the module and class here, its arguments, and what other programs call the same.
NAMES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "ddim": ("ddim", "DDIMScheduler", {}, ()),
    "ddpm": ("ddpm", "DDPMScheduler", {}, ()),
    "ddpm_large": ("ddpm", "DDPMScheduler", {"variance_type": "fixed_large"}, ()),  # sigma-hat of the DDIM paper
    "pndm": ("pndm", "PNDMScheduler", {"skip_prk_steps": True}, ("plms",)),
    "lms": ("lms", "LMSDiscreteScheduler", {}, ()),
    "euler": ("euler", "EulerDiscreteScheduler", {}, ()),
    "euler_a": ("euler", "EulerAncestralDiscreteScheduler", {}, ("euler_ancestral",)),
    "heun": ("heun", "HeunDiscreteScheduler", {}, ()),
    "dpm++_2m": ("dpm_solver", "DPMSolverMultistepScheduler", {}, ("dpmpp_2m", "dpmsolver++")),
    "dpm++_2m_sde": ("dpm_solver", "DPMSolverMultistepScheduler", SDE, ("dpmpp_2m_sde",)),
    "dpm++_3m": ("dpm_solver", "DPMSolverMultistepScheduler", {"solver_order": 3}, ("dpmpp_3m",)),
    "dpm++_3m_sde": ("dpm_solver", "DPMSolverMultistepScheduler", {**SDE, "solver_order": 3}, ("dpmpp_3m_sde",)),
    "unipc": ("unipc", "UniPCMultistepScheduler", {}, ("uni_pc", "uni_pc_bh2")),
    "lcm": ("lcm", "LCMScheduler", {}, ()),
}
# What may stand behind a name: how sigmas are spaced.
SPACINGS = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
SPACED = ("lms", "euler", "heun", "dpm++_2m", "dpm++_2m_sde", "dpm++_3m", "dpm++_3m_sde", "unipc")


def plain(name: str) -> str:
    """A name without what programs write differently: "DPM++ 2M Karras" -> "dpm++2mkarras"."""
    return re.sub(r"[\s_-]", "", name.lower())


def table() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every plain name -> minisd's name, and the arguments of the spacing."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, (_, kind, arguments, others) in NAMES.items():
        classes = () if arguments and name != "pndm" else (kind, kind.removesuffix("Scheduler"))
        for one in (name, *others, *classes):
            found[plain(one)] = (name, {})
            for spacing, extra in SPACINGS.items() if name in SPACED else ():
                found[plain(one + spacing)] = (name, extra)
    return found


def named(name: str) -> tuple[Any, dict[str, Any]]:
    """(class, arguments) of a name. Raises ValueError for one that nobody uses, with those that there are."""
    known = table().get(plain(name))
    if known is None:
        spacings = ", ".join(SPACINGS)
        raise ValueError(f"scheduler={name!r}: must be one of {', '.join(NAMES)}; some may be followed by {spacings}")
    module, kind, arguments, _ = NAMES[known[0]]
    return getattr(import_module(f"minisd.schedulers.{module}"), kind), {**arguments, **known[1]}


def make_scheduler(scheduler: Any, config: Mapping[str, Any], own: str = "ddim") -> Any:
    """A scheduler by name with the noise schedule of a model's `config`, or the object given. None is DDIM.

    "model" is the one that `config` names, or else `own`. Raises ValueError as `named`.
    """
    if scheduler == "model":
        kind, _ = named(config.get("_class_name") or own)
        return kind.from_config(config)
    if not isinstance(scheduler, str | None):
        return scheduler
    kind, arguments = named(scheduler or "ddim")
    return kind.from_config(config, **arguments)
