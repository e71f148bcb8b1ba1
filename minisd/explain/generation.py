"""The one real generation that the page shows, read by taps while it runs.

In: a model, a prompt, settings. Out: a `Generation` with everything in it; not one bit of the picture is changed by
looking. Tensors are reduced as they come, so that a model of SD 1.5's size needs no more memory than without.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minisd.explain.packing import reduced
from minisd.lab.hooks import Listener
from minisd.lab.taps import Reading
from minisd.pipeline import StableDiffusion, to_pictures
from minisd.sampling import Sampling, Step

ATTENTION_SIDE = 16  # maps are averaged to this many positions a side
ATTENTION_BYTES = 1_200_000  # of all maps together; steps are left out beyond
TOKENS = 14  # with maps of their own: start, words, end
CHANNELS = 8  # of a feature map that are shown: those that vary most
FEATURE_STEPS = 4


@dataclass
class Generation:
    """A prompt's whole way to a picture."""

    sd: StableDiffusion
    prompt: str
    sampling: Sampling  # with a seed, steps and guidance scale settled
    noise: Tensor  # (1, 4, h, w), what the seed draws
    pieces: list[str]  # the tokens that have attention maps: start, pieces, end
    steps: list[Step] = field(default_factory=list)
    predictions: dict[str, list[Tensor]] = field(default_factory=dict)  # negative, positive, guided: (4, h, w) a step
    attention: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # layer -> step -> (heads, tokens, h, w)
    features: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # block -> step -> (CHANNELS, h, w)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # block -> (C, h, w)
    seconds: dict[str, float] = field(default_factory=dict)  # block -> of all steps together
    previews: list[Image.Image] = field(default_factory=list)  # x0-hat of each step, decoded

    @property
    def count(self) -> int:
        return self.sampling.steps or 0

    @property
    def scale(self) -> float:
        return self.sampling.guidance_scale or 0.0

    @cached_property
    def picture(self) -> Image.Image:
        return to_pictures(self.sd.decode(self.steps[-1].latents))[0]

    def hear(self, reading: Reading) -> None:
        """Take from a reading what the page shows, and let the tensor go."""
        assert reading.tensor is not None
        half, name, step = reading.positive if reading.halves else reading.tensor, reading.name, reading.step or 0
        if name.startswith("guidance."):
            self.predictions.setdefault(name.partition(".")[2], []).append(half[0].float().cpu())
        elif name.endswith(".probabilities"):
            if step in self.attention_steps:
                self.attention.setdefault(name, {})[step] = self.maps(half[0])
        elif step in spread(self.count, FEATURE_STEPS):
            self.shapes[name] = tuple(half.shape[1:])
            chosen = half[0].flatten(1).std(dim=1).topk(min(CHANNELS, half.shape[1])).indices
            self.features.setdefault(name, {})[step] = reduced(half[0, chosen], ATTENTION_SIDE).float().cpu()
        reading.tensor = None

    @cached_property
    def attention_steps(self) -> list[int]:
        """The steps whose attention is kept: all of them, if there is room."""
        config, layers = self.sd.unet.config, len(cross_attention(self.sd))
        heads = max(config.heads_at(level) for level in range(len(config.widths)))
        positions = 0.4 * layers * ATTENTION_SIDE**2  # deeper layers have fewer
        most = int(ATTENTION_BYTES / (heads * len(self.pieces) * positions))
        return spread(self.count, max(2, most))

    def maps(self, probabilities: Tensor) -> Tensor:
        """Attention weights (heads, N, T) -> maps (heads, tokens, h, w) of the tokens that are shown."""
        height, width = self.steps_size(probabilities.shape[1])
        columns = probabilities[:, :, : len(self.pieces)].float()  # (heads, N, tokens)
        maps = columns.transpose(1, 2).reshape(len(columns), -1, height, width)
        return reduced(maps, ATTENTION_SIDE).half().cpu()

    def steps_size(self, positions: int) -> tuple[int, int]:
        """Height and width of a feature map of so many positions: the latents', halved as often as need be."""
        height, width = self.noise.shape[2:]
        while height * width > positions:
            height, width = -(-height // 2), -(-width // 2)
        return height, width


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the indices from 0 to count - 1, first and last among them, evenly."""
    if count <= most:
        return list(range(count))
    return sorted({round(place * (count - 1) / (most - 1)) for place in range(most)})


def cross_attention(sd: StableDiffusion) -> list[str]:
    """The UNet's cross-attention layers, in order, by the names of their taps."""
    names = (name for name, _ in sd.unet.named_modules() if name.endswith("cross_attn"))
    return [f"unet.{name}.probabilities" for name in names]


def blocks(sd: StableDiffusion) -> dict[str, Any]:
    """The UNet's blocks, in order."""
    parts = (("down", sd.unet.down), ("middle", sd.unet.middle), ("up", sd.unet.up))
    return {f"unet.{part}.{place}": block for part, row in parts for place, block in enumerate(row)}


@contextmanager
def timed(modules: dict[str, Any], seconds: dict[str, float]) -> Iterator[None]:
    """Add up how long each of the modules takes."""
    began: dict[str, float] = {}

    def start(name: str) -> None:
        began[name] = time.perf_counter()

    def stop(name: str) -> None:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began[name]

    with Listener() as listener:
        for name, module in modules.items():
            listener.before(module, lambda *_, name=name: start(name))
            listener.after(module, lambda *_, name=name: stop(name))
        yield


@torch.no_grad()
def generate(sd: StableDiffusion, prompt: str, sampling: Sampling) -> Generation:
    """Run the sampling loop, tapped. `sampling` has a seed. The picture is `text_to_image`'s, bit for bit."""
    steps, scale = sampling.steps_and_scale(sd.generation)
    settled = replace(sampling, steps=steps, guidance_scale=scale)
    generator = settled.make_generator()
    noise = sd.initial_noise((1, *sd.latent_shape(settled.height, settled.width)), generator, None)
    found = Generation(sd, prompt, settled, noise, token_pieces(sd, prompt)[:TOKENS])
    patterns = [*cross_attention(sd), *blocks(sd), *(f"guidance.{name}" for name in guidance_taps(scale))]
    with timed(blocks(sd), found.seconds), sd.taps(*patterns, keep=True, stats=False, listen=found.hear):
        for step in sd.denoise(prompt, replace(settled, seed=None, generator=generator, latents=noise)):
            found.steps.append(replace(step))
    found.previews = [to_pictures(sd.decode(step.x0))[0] for step in found.steps]
    return found


def guidance_taps(scale: float) -> tuple[str, ...]:
    """Without guidance there is one prediction only."""
    return ("negative", "positive", "guided") if scale > 1 else ("guided",)


def token_pieces(sd: StableDiffusion, prompt: str) -> list[str]:
    """The tokens of a prompt as they read, start and end included."""
    return sd.tokenizer.tokens(prompt)
