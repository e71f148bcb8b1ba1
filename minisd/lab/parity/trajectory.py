"""One run of a pipeline's own loop, with the calls between its parts written down, or answered in their place.

In: methods of a pipeline's networks and scheduler, and what is to happen there. Out: a `Trajectory`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minisd.lab.parity.calls import first_tensor

Method = Callable[..., Any]
Wrapper = Callable[[Method], Method]
Answer = Callable[[Tensor], Any]  # a network's output in the form that the loop expects


@dataclass
class UNetCall:
    """latents (R, C, H, W), timestep, context (R, T, D) -> noise (R, C, H, W): R rows, both halves of guidance."""

    latents: Tensor
    timestep: Tensor
    context: Tensor
    noise: Tensor


@dataclass
class StepCall:
    """A scheduler's step: guided noise and x_t -> x_(t-1)."""

    noise: Tensor
    timestep: Tensor
    sample: Tensor
    previous: Tensor


@dataclass
class Trajectory:
    """All tensors that went from one part of a pipeline to another, in one run."""

    tokens: list[Tensor] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)
    unet: list[UNetCall] = field(default_factory=list)
    steps: list[StepCall] = field(default_factory=list)
    z: Tensor | None = None  # what the VAE was given to decode
    images: Tensor | None = None

    def embedding_of(self, ids: Tensor) -> Tensor | None:
        """The text encoder's output for one row of ids, (T, D)."""
        for tokens, embeddings in zip(self.tokens, self.embeddings, strict=True):
            for row, embedding in zip(tokens, embeddings, strict=True):
                if torch.equal(row.cpu(), ids.cpu()):
                    return embedding
        return None

    def noise_for(self, index: int, latents: Tensor, context: Tensor) -> Tensor:
        """The UNet's output at a step, in the order of rows of these inputs."""
        call = self.unet[min(index, len(self.unet) - 1)]
        return call.noise[matching_rows((latents, context), (call.latents, call.context))]


def first_arguments(args: Any, kwargs: Any, count: int) -> list[Any]:
    """The first `count` arguments of a call, in the order in which they were written."""
    return [*args, *kwargs.values()][:count]


# ---- wrappers of methods: they write down a call, and with `playback` answer it from another run ---------------


def records_text(heard: Trajectory, answer: Answer, playback: Trajectory | None) -> Wrapper:
    def around(original: Method) -> Method:
        def forward(*args: Any, **kwargs: Any) -> Any:
            (ids,) = first_arguments(args, kwargs, 1)
            rows = [playback.embedding_of(row) for row in ids] if playback else [None]
            known = [row for row in rows if row is not None]
            output = answer(torch.stack(known)) if len(known) == len(ids) else original(*args, **kwargs)
            heard.tokens.append(ids)
            heard.embeddings.append(first_tensor(output))
            return output

        return forward

    return around


def records_unet(heard: Trajectory, answer: Answer, playback: Trajectory | None) -> Wrapper:
    def around(original: Method) -> Method:
        def forward(*args: Any, **kwargs: Any) -> Any:
            latents, t, context = (torch.as_tensor(one).clone() for one in first_arguments(args, kwargs, 3))
            if playback is None:
                output = original(*args, **kwargs)
            else:
                output = answer(playback.noise_for(len(heard.unet), latents, context))
            heard.unet.append(UNetCall(latents, t, context, first_tensor(output)))
            return output

        return forward

    return around


def records_decoder(heard: Trajectory, answer: Answer, playback: Trajectory | None) -> Wrapper:
    def around(original: Method) -> Method:
        def decode(*args: Any, **kwargs: Any) -> Any:
            (heard.z,) = first_arguments(args, kwargs, 1)
            known = playback.images if playback is not None else None
            output = answer(known) if known is not None else original(*args, **kwargs)
            heard.images = first_tensor(output)
            return output

        return decode

    return around


def records_step(heard: Trajectory) -> Wrapper:
    def around(original: Method) -> Method:
        def step(*args: Any, **kwargs: Any) -> Any:
            noise, t, sample = first_arguments(args, kwargs, 3)
            result = original(*args, **kwargs)
            previous = next(iter(result.values() if isinstance(result, Mapping) else result))
            heard.steps.append(StepCall(noise, torch.as_tensor(t), sample, previous))
            return result

        return step

    return around


# ---- rows of a batch -------------------------------------------------------------------------------------

Inputs = tuple[Tensor, Tensor]  # of a UNet: latents and context


def matching_rows(mine: Inputs, theirs: Inputs) -> list[int]:
    """For each row of a UNet's input the row of the other's that it stands for.

    A loop may have the two halves of guidance in either order. What is wrong in latents or in context alone must not
    change the order of the other: rows that agree in one of the two are taken for the same.
    """
    count = len(theirs[0])
    same, swapped = list(range(count)), [*range(count // 2, count), *range(count // 2)]
    if len(mine[0]) == count:
        latents, contexts = zip(mine, theirs, strict=True)
        for rows in (same, swapped):
            if agree(*latents, rows) and agree(*contexts, rows):
                return rows
        for pair, rows in ((latents, same), (contexts, same), (contexts, swapped)):
            if agree(*pair, rows):
                return rows
    return nearest_rows(mine, theirs)


def agree(mine: Tensor, theirs: Tensor, rows: list[int]) -> bool:
    """Are these the same rows, up to rounding in any dtype?"""
    if mine.shape != theirs.shape:
        return False
    return bool((mine - theirs[rows]).abs().max() <= 0.01 * theirs.abs().max())


def nearest_rows(mine: Inputs, theirs: Inputs) -> list[int]:
    """For each row the nearest of the other's, each taken once as long as there are any."""
    free = list(range(len(theirs[0])))
    rows = []
    for index in range(len(mine[0])):

        def apart(row: int, index: int = index) -> float:
            return sum(
                float((m[index] - t[row]).abs().max()) if m[index].shape == t[row].shape else float("inf")
                for m, t in zip(mine, theirs, strict=True)
            )

        best = min(free or range(len(theirs[0])), key=apart)
        if best in free:
            free.remove(best)
        rows.append(best)
    return rows
