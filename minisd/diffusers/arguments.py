"""The arguments that diffusers' three pipelines have in common, and the checks that each call begins with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minisd.diffusers.refusing import accept, shortened
from minisd.noise import Generators

# Arguments of a call that do nothing here, and the values at which they do nothing in diffusers.
IDLE: dict[str, tuple[Any, ...]] = dict.fromkeys(
    ("ip_adapter_image", "ip_adapter_image_embeds", "padding_mask_crop", "denoising_start"), (None,)
)


@dataclass(kw_only=True)
class Asked:
    """The arguments that all three pipelines have, with diffusers' names and defaults.

    `prompt_embeds`, `negative_prompt_embeds` (B, T, D) stand in for texts. `timesteps`, `sigmas`: a schedule of the
    program's own, where the scheduler takes one. `generator`: one, or a list of one for each picture. `output_type`:
    "pil", "np", "pt" or "latent". `cross_attention_kwargs`: for attention processors; "scale" is the strength of LoRAs.
    `callback_on_step_end(pipe, index, timestep, tensors)` is called after each step with the tensors named in
    `callback_on_step_end_tensor_inputs`; what it returns replaces them, and setting `pipe._interrupt` ends the walk.
    `callback(index, timestep, latents)`, older, is called every `callback_steps` steps.
    """

    timesteps: Sequence[int] | None
    sigmas: Sequence[float] | None
    guidance_scale: float
    negative_prompt: str | list[str] | None
    num_images_per_prompt: int
    eta: float
    generator: Generators
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    output_type: str
    return_dict: bool
    cross_attention_kwargs: dict[str, Any] | None
    clip_skip: int | None
    callback_on_step_end: Callable[..., dict[str, Any]] | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    callback: Callable[[int, Tensor, Tensor], None] | None = None
    callback_steps: int | None = 1

    @classmethod
    def of(cls, given: Mapping[str, Any], call: str) -> Asked:
        """From the arguments of a call by name, and its `kwargs`. Raises NotCoveredError for unknown ones."""
        names = [field.name for field in fields(cls)]
        others = given["kwargs"]
        older = {name: others[name] for name in ("callback", "callback_steps") if others.get(name) is not None}
        left = {name: value for name, value in others.items() if name not in ("callback", "callback_steps")}
        accept(call, left, {}, [name for name in given if name not in ("self", "kwargs")])
        accept(call, {name: given[name] for name in IDLE if name in given}, IDLE, [])
        return cls(**{name: given[name] for name in names if name in given}, **older)


class Run(NamedTuple):
    """How many steps the schedule has, the first of them to take, and the schedule itself if a program chose it."""

    steps: int
    start: int
    custom: dict[str, Any]


def one_of(name: str, text: Any, embeds: Tensor | None, *, needed: bool) -> None:
    if text is not None and embeds is not None:
        raise ValueError(f"{name} and {name}_embeds: give one of the two")
    if needed and text is None and embeds is None:
        raise ValueError(f"{name} or {name}_embeds: one of the two is needed")


def check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength}: must be from 0 to 1")


def check_texts(prompt: Any, negative: Any, embeds: Tensor | None, negative_embeds: Tensor | None) -> None:
    """Raise ValueError unless there is one prompt, as text or as embeddings, and embeddings have equal shapes."""
    one_of("prompt", prompt, embeds, needed=True)
    one_of("negative_prompt", negative, negative_embeds, needed=False)
    if embeds is not None and negative_embeds is not None and embeds.shape != negative_embeds.shape:
        shapes = f"{tuple(embeds.shape)} and {tuple(negative_embeds.shape)}"
        raise ValueError(f"prompt_embeds and negative_prompt_embeds: have the shapes {shapes}; must have the same")


def listed(name: str, texts: Any) -> list[str]:
    """One text or several -> a list. Raises ValueError for anything else."""
    several = [texts] if isinstance(texts, str) else texts
    if not isinstance(several, list) or not several or not all(isinstance(text, str) for text in several):
        raise ValueError(f"{name}={shortened(texts)}: must be a text or a list of at least one text")
    return several


def matching(negative: str | list[str] | None, prompt: str | list[str] | None, count: int) -> list[str]:
    """One negative prompt for each prompt: none is empty. One text beside several is an error, as in diffusers."""
    if negative is None:
        return [""] * count
    several = listed("negative_prompt", negative)
    if prompt is not None and isinstance(prompt, str) != isinstance(negative, str):
        raise ValueError("negative_prompt: must be a text or a list, as prompt is")
    if len(several) != count:
        raise ValueError(f"negative_prompt: {len(several)} for {count} prompts")
    return several


def copies(name: str, tensor: Tensor, batch: int) -> int:
    """How often `tensor` (n, C, H, W) must stand in a batch. Raises ValueError where that does not come out even."""
    if len(tensor) > batch or batch % len(tensor):
        raise ValueError(f"{name}: {len(tensor)} of them cannot be shared out to {batch} pictures")
    return batch // len(tensor)


# Two ways to repeat along the batch. Values are the same, but `cat` keeps the order in memory (channels last, if the
# picture came so) and `repeat` does not, and kernels round by it: so each has the place that it has in diffusers.


def stacked(name: str, tensor: Tensor, batch: int) -> Tensor:
    return torch.cat([tensor] * copies(name, tensor, batch))


def repeated(name: str, tensor: Tensor, batch: int) -> Tensor:
    return tensor.repeat(copies(name, tensor, batch), 1, 1, 1)


def enough(name: str, tensor: Tensor, batch: int) -> Tensor:
    return tensor if len(tensor) == batch else repeated(name, tensor, batch)
