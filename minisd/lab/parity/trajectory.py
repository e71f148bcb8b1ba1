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


def recording(heard: Trajectory, answer: Answer, playback: Trajectory | None) -> dict[str, Wrapper]:
    """What wraps the method of each part of a pipeline: it writes its calls into `heard`.

    With `playback` a network is not computed where that run has its output; `answer` gives it the form that the loop
    expects.
    """

    def text(ids: Tensor) -> Tensor | None:
        rows = [playback.embedding_of(row) for row in ids] if playback else []
        return None if not rows or any(row is None for row in rows) else torch.stack(rows)  # type: ignore[arg-type]

    def hear_text(output: Any, ids: Tensor) -> None:
        heard.tokens.append(ids)
        heard.embeddings.append(first_tensor(output))

    def unet(latents: Tensor, timestep: Any, context: Tensor) -> Tensor | None:
        return playback.noise_for(len(heard.unet), latents, context) if playback else None

    def hear_unet(output: Any, latents: Tensor, timestep: Any, context: Tensor) -> None:
        heard.unet.append(UNetCall(latents, torch.as_tensor(timestep), context, first_tensor(output)))

    def hear_decoder(output: Any, z: Tensor) -> None:
        heard.z, heard.images = z, first_tensor(output)

    def hear_step(result: Any, noise: Tensor, timestep: Any, sample: Tensor) -> None:
        previous = next(iter(result.values() if isinstance(result, Mapping) else result))
        heard.steps.append(StepCall(noise, torch.as_tensor(timestep), sample, previous))

    return {
        "text_encoder": wrapper(1, text, hear_text, answer),
        "unet": wrapper(3, unet, hear_unet, answer, copies=True),
        "vae": wrapper(1, lambda _: playback.images if playback else None, hear_decoder, answer),
        "step": wrapper(3, lambda *_: None, hear_step, answer),
    }


def wrapper(count: int, play: Method, hear: Method, answer: Answer, *, copies: bool = False) -> Wrapper:
    """Around a method whose first `count` arguments matter: answered by `play`, if that knows; heard by `hear`."""

    def around(original: Method) -> Method:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()][:count]
            if copies:  # the loop goes on to write into them
                given = [torch.as_tensor(one).clone() for one in given]
            known = play(*given)
            output = original(*args, **kwargs) if known is None else answer(known)
            hear(output, *given)
            return output

        return call

    return around


# ---- rows of a batch -------------------------------------------------------------------------------------

Inputs = tuple[Tensor, Tensor]  # of a UNet: latents and context


def matching_rows(mine: Inputs, theirs: Inputs) -> list[int]:
    """For each row of a UNet's input the row of the other's that it corresponds to.

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
