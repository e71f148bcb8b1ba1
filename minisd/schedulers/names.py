"""Schedulers by the names that people type: minisd's, A1111's, ComfyUI's and diffusers'.

In: "DPM++ 2M Karras", "euler_a", "DPMSolverMultistepScheduler". Out: a class and its arguments.
"""

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

SDE = {"algorithm_type": "sde-dpmsolver++"}


class Row(NamedTuple):
    """The module and class of a scheduler, its arguments, and what other programs call it: "" where they lack it."""

    module: str
    kind: str
    arguments: dict[str, Any]
    a1111: str
    comfyui: str
    others: tuple[str, ...] = ()


NAMES: dict[str, Row] = {
    "ddim": Row("ddim", "DDIMScheduler", {}, "DDIM", "ddim"),
    "ddpm": Row("ddpm", "DDPMScheduler", {}, "", "ddpm"),
    "pndm": Row("pndm", "PNDMScheduler", {"skip_prk_steps": True}, "PLMS", ""),
    "lms": Row("lms", "LMSDiscreteScheduler", {}, "LMS", "lms"),
    "euler": Row("euler", "EulerDiscreteScheduler", {}, "Euler", "euler"),
    "euler_a": Row("euler", "EulerAncestralDiscreteScheduler", {}, "Euler a", "euler_ancestral"),
    "heun": Row("heun", "HeunDiscreteScheduler", {}, "Heun", "heun"),
    "dpm++_2m": Row("dpm_solver", "DPMSolverMultistepScheduler", {}, "DPM++ 2M", "dpmpp_2m", ("dpmsolver++",)),
    "dpm++_2m_sde": Row("dpm_solver", "DPMSolverMultistepScheduler", SDE, "DPM++ 2M SDE", "dpmpp_2m_sde"),
    "dpm++_3m": Row("dpm_solver", "DPMSolverMultistepScheduler", {"solver_order": 3}, "", "", ("dpmpp_3m",)),
    "dpm++_3m_sde": Row(
        "dpm_solver", "DPMSolverMultistepScheduler", {**SDE, "solver_order": 3}, "DPM++ 3M SDE", "dpmpp_3m_sde"
    ),
    "unipc": Row("unipc", "UniPCMultistepScheduler", {}, "UniPC", "uni_pc_bh2", ("uni_pc",)),
    "lcm": Row("lcm", "LCMScheduler", {}, "LCM", "lcm"),
    "ddpm_large": Row("ddpm", "DDPMScheduler", {"variance_type": "fixed_large"}, "", ""),  # sigma-hat of the DDIM paper
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
    for name, row in NAMES.items():
        classes = () if row.arguments and name != "pndm" else (row.kind, row.kind.removesuffix("Scheduler"))
        for one in filter(None, (name, row.a1111, row.comfyui, *row.others, *classes)):
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
    row = NAMES[known[0]]
    return getattr(import_module(f"minisd.schedulers.{row.module}"), row.kind), {**row.arguments, **known[1]}


def a1111_name(name: str) -> str:
    """What AUTOMATIC1111's web UI calls a scheduler: "dpm++_2m_karras" -> "DPM++ 2M Karras"; others in capitals."""
    own, spacing = table().get(plain(name), ("", {}))
    label = NAMES[own].a1111 if own else ""
    words = [word.capitalize() for word, extra in SPACINGS.items() if extra == spacing]
    return " ".join([label, *words]) if label else name.upper()


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
