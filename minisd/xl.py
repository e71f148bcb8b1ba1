"""SDXL (Podell et al. 2023, arXiv:2307.01952): two text encoders, and a UNet that is told sizes beside the text.

    prompt --text_encoder---> (B, 77,  768) --+
           --text_encoder_2-> (B, 77, 1280) --+--> context (B, 77, 2048), then rows that hold one vector of 2816:
                  |                                   the pooled text (1280), and six numbers, 256 each
                  +---------> pooled text

The UNet is that of `unet.py`, driven by its configuration. Since that vector travels behind the context, the loop, the
guidance and the tasks need not know of it.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minisd.config import END
from minisd.pipeline import StableDiffusion
from minisd.sampling import LoopSettings, Sampling, Settings, Step, Texts, matching_prompts
from minisd.text_encoder import TextEncoder
from minisd.tokenizer import usual_padding
from minisd.unet import split_context, timestep_embedding

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StableDiffusionXL(StableDiffusion):
    """SDXL's base model or its refiner. `StableDiffusion.load` makes one of an SDXL checkpoint."""

    def __init__(self, *parts: Any, text_encoder_2: TextEncoder | None = None, **others: Any) -> None:
        """`parts` and `others` are those of `LatentDiffusionModel`. The refiner has one text encoder, the larger."""
        super().__init__(*parts, **others)
        self.text_encoder_2 = text_encoder_2

    @classmethod
    def dtypes(cls, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """The VAE's activations are beyond what float16 holds."""
        return {"vae": torch.float32} if dtype is torch.float16 else {}

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {**super().modules, **({"text_encoder_2": self.text_encoder_2} if self.text_encoder_2 else {})}

    @property
    def pooling(self) -> Any:
        """The text encoder that gives the pooled vector."""
        return self.text_encoder_2 or self.text_encoder

    @property
    def is_refiner(self) -> bool:
        return self.text_encoder_2 is None

    @torch.no_grad()
    def denoise(
        self, prompt: Texts, sampling: Sampling | None = None, **settings: "Unpack[LoopSettings]"
    ) -> Iterator[Step]:
        """The sampling loop, with the sizes that `Sampling` names (by default: those of the image) in the context."""
        chosen = replace(sampling or Sampling(), **settings)
        prompts, negatives = matching_prompts(prompt, chosen.negative_prompt)
        both = self.encode_prompt(prompts, negatives, 1, chosen.clip_skip, chosen.long_prompts)
        scores = chosen.negative_aesthetic_score, chosen.aesthetic_score
        halves = zip(both.chunk(2), scores, strict=True)
        negative, positive = (self.with_sizes(half, self.sizes(chosen, score)) for half, score in halves)
        return super().denoise(positive, replace(chosen, negative_prompt=negative))

    def encode_prompt(
        self, prompts: Texts, negatives: Texts | None, images_per_prompt: int = 1, *how: Any, **named: Any
    ) -> Tensor:
        """As that of `StableDiffusion`, but empty negative prompts are all zeros in the base model."""
        if self.is_refiner:
            return super().encode_prompt(prompts, negatives, images_per_prompt, *how, **named)
        texts = [negatives] if isinstance(negatives, str) else negatives
        if isinstance(texts, list) and not any(texts):
            context = super().encode_prompt(prompts, None, images_per_prompt, *how, **named)
            return torch.cat([torch.zeros_like(context), context])
        context = super().encode_prompt(prompts, negatives, images_per_prompt, *how, **named)
        if isinstance(texts, list):
            empty = torch.tensor([not text for text in texts for _ in range(images_per_prompt)])
            context[: len(empty)][empty.to(context.device)] = 0
        return context

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents.to(self.vae_dtype))

    def sizes(self, sampling: Sampling, score: float) -> list[float]:
        """What the UNet is told: height and width of the original, top and left of the crop, height and width wanted.

        In training a picture's own size, so that small ones need not be thrown away (section 2.2 of the paper). The
        refiner is told an aesthetic score in the place of the last two.
        """
        _, height, width = self.latent_shape(sampling.height, sampling.width)
        image = height * self.vae.config.downsampling, width * self.vae.config.downsampling
        wanted = [score] if self.is_refiner else (sampling.target_size or image)
        return [*(sampling.original_size or image), *(sampling.crop or (0, 0)), *wanted]

    def read(self, ids: Tensor, clip_skip: int) -> Tensor:
        """Token ids in windows (B, n, 77) -> context (B, 77 n + 2, 2048), with the sizes of an ordinary image.

        Both encoders' last layer but one, not normalised. The pooled vector is that of the first window.
        """
        flat, usual = ids.flatten(0, 1), Sampling()
        context, pooled = self.read_pooled(flat, clip_skip)
        if not self.is_refiner:
            first = self.text_encoder.hidden(flat, len(self.text_encoder.layers) - 1 - clip_skip)
            context = torch.cat([first, context], dim=-1)
        context = rearrange(context, "(b n) t d -> b (n t) d", n=ids.shape[1])
        return self.told(context, pooled[:: ids.shape[1]], self.sizes(usual, usual.aesthetic_score))

    def read_pooled(self, ids: Tensor, clip_skip: int) -> tuple[Tensor, Tensor]:
        """The larger text encoder on ids (B, 77): (B, 77, 1280), and what it says at the end token, projected."""
        encoder, vocabulary = self.pooling, self.tokenizer.vocabulary
        end = (ids == vocabulary[END]).int().argmax(dim=-1, keepdim=True)  # (B, 1), the first end token
        positions = torch.arange(ids.shape[1], device=ids.device)
        ids = torch.where(positions > end, vocabulary[usual_padding(encoder.config)], ids)
        count = len(encoder.layers)
        before = x = encoder.hidden(ids, count - 1 - clip_skip)
        for layer in encoder.layers[count - 1 - clip_skip :]:
            x = layer(x)
        rows = torch.arange(len(x), device=x.device)
        return before, encoder.projection(encoder.final_norm(x)[rows, end[:, 0]])

    def told(self, context: Tensor, pooled: Tensor, sizes: list[float]) -> Tensor:
        """Context (B, T, D) and the pooled vector (B, P) -> (B, T + n, D): behind it the vector that the UNet takes."""
        width, (count, _, depth) = self.unet.config.added_width, context.shape
        told = torch.tensor(sizes, dtype=context.dtype, device=context.device)  # rounded to it, as in diffusers
        numbers = timestep_embedding(told, self.unet.config.number_width)
        vector = torch.cat([pooled, numbers.flatten().to(context.dtype).expand(count, -1)], dim=-1)  # (B, added_width)
        rows = F.pad(vector, (0, -width % depth)).unflatten(1, (-1, depth))
        return torch.cat([context, rows], dim=1)

    def with_sizes(self, context: Tensor, sizes: list[float]) -> Tensor:
        """The same context, and other numbers behind it."""
        text, vector = split_context(context, self.unet.config.added_width)
        return self.told(text, vector[:, : self.pooling.config.projection], sizes)


def refine(
    base: StableDiffusionXL,
    refiner: StableDiffusionXL,
    prompt: Texts,
    share: float = 0.8,
    **settings: "Unpack[Settings]",
) -> Iterator[Step]:
    """The base model takes the first `share` of all timesteps, the refiner the rest (section 2.5 of the paper).

    Yields the steps of both; the last one's latents are for `refiner.decode`. Raises ValueError for a `share` that
    leaves nothing to one of them.
    """
    sampling = Sampling(**settings).with_generator()
    steps, _ = sampling.steps_and_scale(base.generation)
    scheduler = base.make_scheduler(sampling.scheduler, steps)
    first = int((scheduler.timesteps >= round(len(scheduler) * (1 - share))).sum()) // scheduler.order
    if not 0 < first < steps:
        raise ValueError(f"share={share}: leaves {first} of {steps} steps to the base model; both must have some")

    def both() -> Iterator[Step]:
        for step in islice(base.denoise(prompt, sampling), first * scheduler.order):
            yield step
        rest = replace(sampling, steps=steps, start=first, latents=step.latents)
        yield from refiner.denoise(prompt, rest)

    return both()
