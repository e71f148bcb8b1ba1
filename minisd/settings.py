"""What a person may ask of `pipeline.py`, checked: every impossible setting is a ValueError that names it."""

from numbers import Real

import torch
from torch import Tensor

from minisd.noise import Generators

Texts = str | list[str] | Tensor  # a prompt, several, or what a text encoder made of them


def list_of_texts(name: str, value: Texts) -> list[str] | Tensor:
    """A list of texts; context (B, T, D) stays what it is."""
    if isinstance(value, Tensor):
        if value.ndim != 3:
            raise ValueError(f"{name} has the shape {tuple(value.shape)}: context has three dimensions, (B, 77, D)")
        return value
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={value!r}: must be a text or a list of at least one text")
    return list(texts)


def matching_prompts(prompt: Texts, negative: Texts) -> tuple[list[str] | Tensor, list[str] | Tensor]:
    """Lists of equal length; one negative prompt serves all. Raises ValueError for no prompt, or for two lengths."""
    prompts, negatives = list_of_texts("prompt", prompt), list_of_texts("negative_prompt", negative)
    if isinstance(negative, str):
        negatives = [negative] * len(prompts)
    if len(negatives) != len(prompts):
        raise ValueError(f"negative_prompt: {len(negatives)} for {len(prompts)} prompts; give one, or one each")
    return prompts, negatives


def check_settings(steps: int, most_steps: int, images_per_prompt: int, **numbers: float) -> None:
    """Raises ValueError for counts that are not whole and positive, and for `numbers` below 0 or not finite."""
    for name, count in (("steps", steps), ("images_per_prompt", images_per_prompt)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"{name}={count}: must be a whole number, at least 1")
    if steps > most_steps:
        raise ValueError(f"steps={steps}: must be at most the schedule's {most_steps}")
    for name, number in numbers.items():
        if not isinstance(number, Real) or not 0 <= number < float("inf"):
            raise ValueError(f"{name}={number}: must be a finite number, at least 0")


def check_start(start: int, steps: int, latents: Tensor | None) -> None:
    """Raises ValueError unless `start` is the index of a step, and there are latents to start from."""
    if not isinstance(start, int) or not 0 <= start < steps:
        raise ValueError(
            f"start={start}: must be a whole number from 0 to {steps - 1}, the index of one of {steps} steps"
        )
    if start > 0 and latents is None:
        raise ValueError(f"start={start}: needs latents, at the noise level of that step")


def one_source(seed: int | None, generator: Generators) -> Generators:
    """The one source of randomness: a generator, or one made from `seed`, or None for torch's global one."""
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("seed and generator: give one of the two")
    try:
        return torch.Generator().manual_seed(seed)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"seed={seed!r}: must be a whole number of at most 64 bits") from None
