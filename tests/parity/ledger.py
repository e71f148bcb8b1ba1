"""The parity ledger: what is compared with diffusers, in which dtype, how far apart it is and may be.

In float32 and float16 on a CPU the promise is torch.equal: 0 is allowed. bfloat16 is the one exception: minisd runs its
convolutions with channels last, which is faster, and other kernels round differently. What is allowed then is not a
number that somebody picked. The truth is diffusers in float32; diffusers in bfloat16 has an error against it, its own
rounding; minisd's error against the same truth may be at most SLACK times that. (Root mean squares, which a few unlucky
elements do not move: measured ratios are 0.94 to 1.06.)

Engines that compute float32 by other kernels are held to the same rule, one step up: the truth is diffusers in float64.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SCALES = (1.0, 0.01)  # of the input; the small one makes epsilons visible
SLACK = {"exact": 1.15, "fast": 1.15, "openvino": 2.0}  # of the reference's rounding; OpenVINO: 1.35 to 1.64 measured


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: the worst of several inputs."""

    module: str
    dtype: torch.dtype
    difference: float  # minisd to diffusers, in this dtype: the largest, relative to the output's largest value
    error: float  # minisd in this dtype to diffusers in `truth`, as a root mean square relative to the output's
    rounding: float  # diffusers in this dtype to diffusers in `truth`, likewise
    engine: str = "exact"

    @property
    def allowed(self) -> float:
        """The largest `error`; but where `difference` must be 0, the rounding itself."""
        return self.rounding if self.exact else SLACK[self.engine] * self.rounding

    @property
    def exact(self) -> bool:
        return self.engine == "exact" and (self.dtype != torch.bfloat16 or self.module == "text encoder")

    @property
    def holds(self) -> bool:
        return self.error <= self.allowed and (self.difference == 0 or not self.exact)


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


def largest(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to b's largest value."""
    return 0.0 if torch.equal(a, b) else float((a.float() - b.float()).abs().max() / b.float().abs().max())


def root_mean_square(a: Tensor, b: Tensor) -> float:
    """The root mean square of the difference, relative to b's."""
    return float((a.float() - b.float()).norm() / b.float().norm())


@torch.no_grad()
def measure(
    pipelines: dict[torch.dtype, Any],
    models: dict[torch.dtype, Any],
    modules: Iterable[str] = tuple(MODULES),
    *,
    truth: torch.dtype = torch.float32,
    engine: str = "exact",
) -> list[Entry]:
    """Fill the ledger: diffusers' pipelines and minisd's models, by dtype, on the same weights.

    A line for each module and each dtype of `models`, but for a `truth` wider than what is measured.
    """
    entries = []
    for module in modules:
        compare = MODULES[module]
        exact = [reference for reference, _ in compare(pipelines[truth], models[truth], truth)]
        for dtype in (dtype for dtype in models if dtype in DTYPES):
            pairs = list(compare(pipelines[dtype], models[dtype], dtype))
            lines = [
                Entry(module, dtype, largest(b, a), root_mean_square(b, e), root_mean_square(a, e), engine)
                for (a, b), e in zip(pairs, exact, strict=True)
            ]
            entries.append(max(lines, key=lambda line: (line.difference, line.error / (line.allowed or 1))))
    return entries


def other_engines() -> list[str]:
    """Those that are installed and compute a CPU's float32 by other kernels."""
    return ["fast"] + ["openvino"] * (find_spec("openvino") is not None)


def measure_engines(folder: Any, engines: Iterable[str]) -> list[Entry]:
    """The same for engines that compute float32 in their own way, on the model in `folder`."""
    from diffusers import StableDiffusionPipeline

    import minisd

    dtypes = (torch.float64, torch.float32)
    pipelines = {dtype: StableDiffusionPipeline.from_pretrained(folder, dtype=dtype) for dtype in dtypes}
    entries = []
    for engine in engines:
        models = {
            torch.float64: minisd.StableDiffusion.load(folder, dtype=torch.float64),
            torch.float32: minisd.StableDiffusion.load(folder, engine=engine),
        }
        entries += measure(pipelines, models, ("UNet", "VAE decode"), truth=torch.float64, engine=engine)
    return entries
