"""The parity ledger: what is compared with diffusers, in which dtype, how far apart it is and may be.

In float32 and float16 on a CPU the promise is torch.equal: 0 is allowed. bfloat16 is the one exception: minisd runs its
convolutions with channels last, which is faster, and other kernels round differently. What is allowed then is not a
number that somebody picked: diffusers in bfloat16 is some way from diffusers in float32 on the same input, its own
rounding error. Two roundings may lie on two sides of the truth, so twice that is allowed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (1.0, 0.01)  # of the input; the small one makes epsilons visible


@dataclass(frozen=True)
class Entry:
    """One line of the ledger; differences are the largest absolute ones, relative to the output's largest value."""

    module: str
    dtype: torch.dtype
    difference: float  # minisd to diffusers, in this dtype
    rounding: float  # diffusers in this dtype to diffusers in float32

    @property
    def allowed(self) -> float:
        convolves = self.module != "text encoder"
        return 2 * self.rounding if self.dtype == torch.bfloat16 and convolves else 0.0


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_encoder(theirs: Any, mine: Any, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    ids = mine.tokenizer(["a photograph of an astronaut riding a horse", ""])
    yield theirs.text_encoder(ids)[0], mine.text_encoder(ids)


def unet(theirs: Any, mine: Any, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    width = mine.config.unet.context_width
    for scale in SCALES:
        x, context, t = (
            (randn(2, 4, 16, 24) * scale).to(dtype),
            randn(2, 77, width, seed=1).to(dtype),
            torch.tensor(500),
        )
        yield theirs.unet(x, t, encoder_hidden_states=context).sample, mine.unet(x, t, context)


def vae_encode(theirs: Any, mine: Any, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for scale in SCALES:
        images = (randn(1, 3, 128, 64) * scale).clamp(-1, 1).to(dtype)
        yield theirs.vae.encode(images).latent_dist.mean, mine.vae.encode(images).mean


def vae_decode(theirs: Any, mine: Any, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for scale in SCALES:
        latents = (randn(1, 4, 16, 8) * scale).to(dtype)
        yield theirs.vae.decode(latents).sample, mine.vae.decode(latents)


def trajectory(theirs: Any, mine: Any, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Ten steps of DDIM with guidance 7.5 and eta 0.7: the last latents."""
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    settings = {"negative_prompt": "blue", "eta": 0.7}
    latents = theirs("a cat", num_inference_steps=10, generator=seeds[0], output_type="latent", **settings).images
    *_, last = mine.denoise("a cat", steps=10, generator=seeds[1], **settings)
    yield latents, last.latents


MODULES: dict[str, Callable[[Any, Any, torch.dtype], Iterator[tuple[Tensor, Tensor]]]] = {
    "text encoder": text_encoder,
    "UNet": unet,
    "VAE encode": vae_encode,
    "VAE decode": vae_decode,
    "10 DDIM steps": trajectory,
}


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@torch.no_grad()
def measure(pipelines: dict[torch.dtype, Any], models: dict[torch.dtype, Any]) -> list[Entry]:
    """Fill the ledger: diffusers' pipelines and minisd's models, by dtype, on the same weights."""
    entries = []
    for module, compare in MODULES.items():
        exact = [reference for reference, _ in compare(pipelines[torch.float32], models[torch.float32], torch.float32)]
        for dtype in DTYPES:
            pairs = list(compare(pipelines[dtype], models[dtype], dtype))
            difference = max(0.0 if torch.equal(a, b) else relative(b, a) for a, b in pairs)
            rounding = max(relative(a, e) for (a, _), e in zip(pairs, exact, strict=True))
            entries.append(Entry(module, dtype, difference, rounding))
    return entries
