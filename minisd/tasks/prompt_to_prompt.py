"""Prompt-to-prompt (Hertz et al. 2022, arXiv:2208.01626): another prompt, with the attention of the first one.

Both prompts are denoised side by side from the same latents. Layout lives in the attention maps M; in the first steps
those of the new prompt, M*, are replaced (section 3.2 of the paper; c, the weights, are 1 unless a word has another):

    cross-attention   c * (M P)   for words that the old prompt has too, or that stand where another word stood;
                      P says which tokens of the old prompt a token of the new one answers to
                      c * M*      for words that are new
    self-attention    M           at up to 16 x 16 positions

In: two prompts; latents of a real image too, which is inverted exactly first. Out: steps whose latents have two rows,
the old picture and the new one.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minisd.lab.taps import Reading
from minisd.pipeline import StableDiffusion
from minisd.sampling import Sampling, Step
from minisd.tasks.images import size_of
from minisd.tasks.inversion import invert

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from minisd.sampling import Settings

MOST_POSITIONS = 16 * 16  # in a self-attention that is replaced, as the authors have it


def prompt_to_prompt(
    sd: StableDiffusion,
    prompt: str,
    new_prompt: str,
    *,
    cross: float = 0.8,
    self_attention: float = 0.4,
    weights: Mapping[str, float] | None = None,
    latents: Tensor | None = None,
    start: int = 0,
    **settings: "Unpack[Settings]",
) -> Iterator[Step]:
    """Denoise `prompt` and `new_prompt` together, the second with the attention of the first.

    `cross`, `self_attention`: the shares of the steps, 0 to 1, in which each is replaced. `weights`: how much more, or
    less, a word of `new_prompt` is attended to: {"snowy": 2.0}. `latents`: those of a real image (1, 4, H/8, W/8),
    scaled, that `prompt` describes: it is inverted to the step `start`. `settings` are `denoise`'s. Yields steps whose
    latents are (2, 4, H/8, W/8). Raises ValueError for shares out of range, or a weight for a word that is not there.
    """
    for name, share in (("cross", cross), ("self_attention", self_attention)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name}={share}: must be a number from 0 to 1")
    sampling = Sampling(**settings)
    steps, _ = sampling.steps_and_scale(sd.generation)
    if sampling.images_per_prompt != 1 or not isinstance(sampling.negative_prompt, str):
        raise ValueError("prompt-to-prompt makes one image from one prompt and one negative prompt")
    control = make_control(sd, prompt, new_prompt, weights or {})
    control = replace(control, cross=int(cross * steps), self_attention=int(self_attention * steps))
    return controlled(sd, (prompt, new_prompt), control, sampling, latents, start)


def controlled(
    sd: StableDiffusion,
    prompts: tuple[str, str],
    control: "Control",
    sampling: Sampling,
    image: Tensor | None,
    start: int,
) -> Iterator[Step]:
    """The loop with the edits of attention in place; a real image's residuals are added to both rows."""
    residuals: dict[int, Tensor] = {}
    if image is not None:
        inversion = list(invert(sd, prompts[0], image, start=start, **own_settings(sampling)))
        residuals = {step.inverted: step.residual for step in inversion}
        height, width = size_of(sd, image)
        noise = inversion[-1].latents
        sampling = replace(sampling, height=height, width=width, start=inversion[-1].inverted)
    else:
        sampling = sampling.with_generator()
        shape = (1, *sd.latent_shape(sampling.height, sampling.width))
        noise = sd.initial_noise(shape, sampling.generator, None)
    both = replace(sampling, latents=noise.expand(2, -1, -1, -1))
    side = max(noise.shape[2:])
    with sd.taps(edit={name: control.edit(name) for name in layers(sd, side)}, stats=False):
        for step in sd.denoise(list(prompts), both):
            if step.index in residuals:
                step.latents = step.latents + residuals[step.index]
            yield step


def own_settings(sampling: Sampling) -> Any:
    """The settings that an inversion takes."""
    return {name: value for name, value in vars(sampling).items() if name not in ("latents", "start")}


def layers(sd: StableDiffusion, side: int) -> list[str]:
    """The attention layers that are edited, as taps: all cross-attention, self-attention at few positions."""
    found = []
    for part in ("down", "middle", "up"):
        for place, block in enumerate(getattr(sd.unet, part)):
            if block.attention is not None:
                kinds = ["cross_attn"] + ["self_attn"] * (side**2 <= MOST_POSITIONS)
                found += [f"unet.{part}.{place}.attention.{kind}.probabilities" for kind in kinds]
            side = -(-side // 2) if block.downsample is not None else side * 2 if block.upsample is not None else side
    return found


# ---- which token answers to which ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """What is done to the attention of the new prompt."""

    mapping: Tensor  # (T, T), P: a column for each token of the new prompt
    shared: Tensor  # (T,), 1 where a token answers to tokens of the old prompt, 0 where it is new
    weights: Tensor  # (T,), c
    cross: int = 0  # steps with another cross-attention
    self_attention: int = 0  # steps with another self-attention

    def edit(self, name: str) -> Any:
        """The edit of one layer: a function of its attention weights (B, heads, N, M)."""
        crossing = "cross_attn" in name
        last = self.cross if crossing else self.self_attention

        def edit(maps: Tensor, reading: Reading) -> Tensor:
            if (reading.step or 0) < last:
                old, new = maps[-2], maps[-1]  # the prompts' rows; with guidance two without a prompt come before
                maps[-1] = self.crossed(old, new) if crossing else old
            return maps

        return edit

    def crossed(self, old: Tensor, new: Tensor) -> Tensor:
        """Cross-attention maps M and M* (heads, N, T) -> those of the new prompt."""
        mapping, shared, weights = (one.to(old) for one in (self.mapping, self.shared, self.weights))
        return weights * (shared * (old @ mapping) + (1 - shared) * new)


def make_control(sd: StableDiffusion, prompt: str, new_prompt: str, weights: Mapping[str, float]) -> Control:
    """Match the words of two prompts: equal words, and words that stand in the place of as many others."""
    places = sd.tokenizer.context_length
    (old_words, old), (new_words, new) = (word_places(sd, text) for text in (prompt, new_prompt))
    mapping, shared = torch.eye(places), torch.ones(places)
    ends = old[-1].stop if old else 1, new[-1].stop if new else 1
    mapping[:, 1 : ends[1]], shared[1 : ends[1]] = 0, 0
    mapping[:, ends[1]] = torch.eye(places)[:, ends[0]] if max(ends) < places else 0  # the end token
    matcher = difflib.SequenceMatcher(None, old_words, new_words, autojunk=False)
    for kind, first, last, new_first, new_last in matcher.get_opcodes():
        if kind in ("equal", "replace") and last - first == new_last - new_first:
            for source, target in zip(old[first:last], new[new_first:new_last], strict=True):
                mapping[source.start : source.stop, target.start : target.stop] = between(source, target)
                shared[target.start : target.stop] = 1
    return Control(mapping, shared, word_weights(new_words, new, places, weights))


def between(source: range, target: range) -> Tensor:
    """A word's tokens and those in their place: one to one, or all to all where their numbers differ."""
    if len(source) == len(target):
        return torch.eye(len(source))
    return torch.full((len(source), len(target)), 1 / len(target))


def word_places(sd: StableDiffusion, text: str) -> tuple[list[str], list[range]]:
    """The words of a prompt, and the places of their tokens, of which the context length cuts the last ones off."""
    places, at, most = [], 1, sd.tokenizer.context_length - 1
    words = text.lower().split()
    for word in words:
        count = len(sd.tokenizer.ids(word))
        places.append(range(min(at, most), min(at + count, most)))
        at += count
    return words, places


def word_weights(words: list[str], places: list[range], length: int, weights: Mapping[str, float]) -> Tensor:
    """How much each token is attended to. Raises ValueError for a word that the prompt does not have."""
    found = torch.ones(length)
    for word, weight in weights.items():
        plain = [one.strip(".,;:!?") for one in words]
        if word.lower() not in plain:
            raise ValueError(f"weights: {word!r} is not a word of the new prompt ({' '.join(words)})")
        for one, place in zip(plain, places, strict=True):
            if one == word.lower():
                found[place.start : place.stop] = weight
    return found
