"""Measure minisd against the code that Stable Diffusion 1 was trained with: github.com/CompVis/stable-diffusion.

UNet, autoencoder, timestep embedding and DDIM, both sides with the same random weights, float32 on the CPU.
The text encoder is missing: CompVis' FrozenCLIPEmbedder is transformers' CLIPTextModel and no code of their
own. Needs a checkout of CompVis' repository and PyYAML, about 6 GB of memory and a few minutes.

    python scripts/compare_compvis.py ../stable-diffusion
    python scripts/compare_compvis.py ../stable-diffusion --narrow    # small networks, a few seconds

Prints a table; exit status 1 if any output differs by more than 1e-5 of its scale, 2 if the path is no
checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from minisd import SD15, DDIMScheduler
from minisd.checkpoint.keymap import Key, unet_keys, vae_keys
from minisd.unet import UNet, timestep_embedding
from minisd.vae import VAE

LIMIT = 1e-5  # largest difference allowed, as a share of the largest output
CONFIG = "configs/stable-diffusion/v1-inference.yaml"
NARROW_UNET = {"model_channels": 32, "channel_mult": [1, 2, 3, 4], "context_dim": 128}
NARROW_VAE = {"ch": 32, "ch_mult": [1, 1, 2, 2]}


# ---------------------------------------------------- CompVis' side


@dataclasses.dataclass(frozen=True)
class CompVis:
    """What is taken from a checkout: four modules, and the configuration of Stable Diffusion 1."""

    openaimodel: ModuleType
    autoencoder: ModuleType
    util: ModuleType
    ddim: ModuleType
    settings: dict[str, Any]


def stub(name: str, **members: object) -> None:
    """Make `import name` work without the package, with nothing in it but `members`."""
    module = ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


def load_compvis(checkout: Path) -> CompVis:
    """Import CompVis' modules. OSError or ImportError if `checkout` does not hold them."""
    settings = yaml.safe_load((checkout / CONFIG).read_text(encoding="utf-8"))["model"]["params"]
    # Imported by their code, used in training only.
    stub("pytorch_lightning", LightningModule=nn.Module)
    stub("taming.modules.vqvae.quantize", VectorQuantizer2=None)
    stub("omegaconf.listconfig", ListConfig=None)
    sys.path.insert(0, str(checkout))
    importlib.invalidate_caches()
    return CompVis(
        openaimodel=importlib.import_module("ldm.modules.diffusionmodules.openaimodel"),
        autoencoder=importlib.import_module("ldm.models.autoencoder"),
        util=importlib.import_module("ldm.modules.diffusionmodules.util"),
        ddim=importlib.import_module("ldm.models.diffusion.ddim"),
        settings=settings,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """CompVis' code prints what it does, and progress bars."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def shake(module: nn.Module) -> nn.Module:
    """Give every parameter a random value, seeded, that keeps activations sane.

    CompVis starts many layers at zero, and norms at one: networks that agree on those have proved little.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            value = noise / parameter[0].numel() ** 0.5
        else:
            value = 0.1 * noise + (1 if name.endswith("weight") else 0)  # only norms have vectors as weights
        parameter.data = value
    return module.eval().requires_grad_(False)


# ---------------------------------------------------- both sides


def twin(ours: Callable[[], nn.Module], theirs: nn.Module, keys: Iterable[Key]) -> Any:
    """minisd's module with the very tensors of CompVis' module, by the key map: no second copy in memory."""
    state = theirs.state_dict()
    renamed = {key.minisd: state.pop(key.compvis).reshape(key.shape) for key in keys}
    if state:
        raise KeyError(f"not in minisd's key map: {', '.join(state)}")
    with torch.device("meta"):
        module = ours()
    module.load_state_dict(renamed, assign=True)
    return module.eval().requires_grad_(False)


class Table:
    """Prints a line per comparison, and remembers whether one of them failed."""

    def __init__(self) -> None:
        self.failed = False
        print("| module | input | max abs minisd | max abs difference | relative to scale |")
        print("|---|---|---|---|---|")

    def row(self, module: str, given: str, ours: Tensor, theirs: Tensor) -> None:
        """Compare two outputs of any one shape."""
        if ours.shape != theirs.shape:
            raise ValueError(f"{module}, {given}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
        difference, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
        within = difference <= LIMIT * scale  # false for NaN
        self.failed = self.failed or not within
        relative = f"{difference / scale:.1e}" + ("" if within else f", above {LIMIT:.0e}")
        print(
            f"| {module} | {given} | {float(ours.abs().max()):.3g} | {difference:.1e} | {relative} |",
            flush=True,
        )


def random(*shape: int, scale: float = 1.0) -> Tensor:
    """Seeded noise, the same for the same shape."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------- comparisons


def compare_timestep_embedding(table: Table, compvis: CompVis) -> None:
    timesteps, width = torch.arange(1000), SD15.unet.widths[0]
    ours, theirs = timestep_embedding(timesteps, width), compvis.util.timestep_embedding(timesteps, width)
    table.row("timestep embedding", "0 to 999", ours, theirs)


def compare_unet(table: Table, compvis: CompVis, narrow: bool) -> None:
    """Square latents one at a time, others two at a time with a timestep each, loud and faint."""
    settings = compvis.settings["unet_config"]["params"] | (NARROW_UNET if narrow else {})
    config = SD15.unet
    if narrow:
        config = dataclasses.replace(config, widths=(32, 64, 96, 128), context_width=128)
    with quiet():
        theirs = shake(compvis.openaimodel.UNetModel(**settings))
    ours = twin(lambda: UNet(config), theirs, unet_keys(config))

    square, other = ((16, 16), (8, 24)) if narrow else ((64, 64), (40, 56))
    cases = [(square, 1.0, [999]), (square, 1.0, [500]), (square, 1.0, [0]), (square, 0.01, [1])]
    cases += [(other, 1.0, [981, 21]), (other, 0.01, [501, 0])]
    for size, scale, timesteps in cases:
        latents, t = random(len(timesteps), 4, *size, scale=scale), torch.tensor(timesteps)
        context = random(len(timesteps), 77, config.context_width)
        given = f"{len(timesteps)}x4x{size[0]}x{size[1]}, scale {scale:g}, t {', '.join(map(str, timesteps))}"
        table.row("UNet", given, ours(latents, t, context), theirs(latents, t, context))


def compare_vae(table: Table, compvis: CompVis, narrow: bool) -> None:
    """Encode pictures of noise to means and log-variances; decode latents."""
    settings = dict(compvis.settings["first_stage_config"]["params"])
    config = SD15.vae
    if narrow:
        settings["ddconfig"] = settings["ddconfig"] | NARROW_VAE
        config = dataclasses.replace(config, widths=(32, 32, 64, 64))
    with quiet():
        theirs: Any = shake(compvis.autoencoder.AutoencoderKL(**settings))
    ours = twin(lambda: VAE(config), theirs, vae_keys(config))

    for side in (64, 128) if narrow else (256, 512):
        image = random(1, 3, side, side).clamp(-1, 1)
        results = [vae.encode(image) for vae in (ours, theirs)]
        moments = [torch.cat([result.mean, result.logvar]) for result in results]
        table.row("VAE encode", f"1x3x{side}x{side}", *moments)
    for side in (8, 16) if narrow else (32, 64):
        latents = random(1, 4, side, side) / config.scaling_factor
        table.row("VAE decode", f"1x4x{side}x{side}", ours.decode(latents), theirs.decode(latents))


class Denoiser:
    """What CompVis' sampler needs of a diffusion model, around a model that is a formula.

    If data are normal with this mean and deviation, the noise in x is known exactly (Bayes).
    """

    mean, deviation = 0.5, 0.7
    num_timesteps, parameterization, device = 1000, "eps", torch.device("cpu")

    def __init__(self, betas: np.ndarray) -> None:
        """`betas` (1000,) float64, made into tables as CompVis' LatentDiffusion does."""
        alphas_cumprod = np.cumprod(1.0 - betas)
        self.betas = torch.tensor(betas, dtype=torch.float32)
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float32)
        self.alphas_cumprod_prev = torch.tensor([1.0, *alphas_cumprod[:-1]], dtype=torch.float32)

    def apply_model(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """The noise in `x` (B, C, H, W) at timesteps `t` (B,)."""
        alpha = self.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        return (1 - alpha) ** 0.5 * (x - alpha**0.5 * self.mean) / (alpha * self.deviation**2 + 1 - alpha)


def compare_ddim(table: Table, compvis: CompVis) -> None:
    """Noise levels, then samples and predicted clean samples at every step, without and with fresh noise."""
    start, end = compvis.settings["linear_start"], compvis.settings["linear_end"]
    model = Denoiser(compvis.util.make_beta_schedule("linear", 1000, linear_start=start, linear_end=end))
    scheduler = DDIMScheduler.from_config(SD15.scheduler)
    table.row("noise schedule", "alpha_bar, 0 to 999", scheduler.alphas_cumprod, model.alphas_cumprod)

    start_noise = random(2, 4, 16, 16)
    for steps in (20, 50):
        for eta in (0.0, 1.0):
            theirs = their_trajectory(compvis.ddim, model, start_noise, steps, eta)
            ours = our_trajectory(scheduler, model, start_noise, steps, eta)
            table.row("DDIM", f"2x4x16x16, N {steps}, eta {eta:g}, x and x0 of every step", ours, theirs)


def their_trajectory(ddim: ModuleType, model: Denoiser, x: Tensor, steps: int, eta: float) -> Tensor:
    """(2, N, B, C, H, W): x after every step, and the x0 predicted on the way."""
    sampler = ddim.DDIMSampler(model)
    sampler.register_buffer = lambda name, value: setattr(sampler, name, value)  # theirs moves all to "cuda"
    torch.manual_seed(0)  # CompVis draws fresh noise from the global generator
    with quiet():
        _, found = sampler.sample(steps, len(x), x.shape[1:], x_T=x, eta=eta, verbose=False, log_every_t=1)
    return torch.stack([torch.stack(found[name][1:]) for name in ("x_inter", "pred_x0")])


def our_trajectory(scheduler: DDIMScheduler, model: Denoiser, x: Tensor, steps: int, eta: float) -> Tensor:
    """The same from minisd."""
    scheduler.set_timesteps(steps)
    torch.manual_seed(0)
    found = []
    for t in scheduler.timesteps:
        found.append(scheduler.step(model.apply_model(x, t.expand(len(x))), t, x, eta=eta))
        x = found[-1].prev_sample
    return torch.stack([torch.stack(list(results)) for results in zip(*found, strict=True)])


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure minisd against CompVis' own code, on random weights.")
    parser.add_argument("checkout", type=Path, help="a checkout of github.com/CompVis/stable-diffusion")
    parser.add_argument("--narrow", action="store_true", help="small networks: seconds instead of minutes")
    arguments = parser.parse_args()
    try:
        compvis = load_compvis(arguments.checkout)
    except (OSError, ImportError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        print(
            f"{arguments.checkout} is not a usable checkout of CompVis/stable-diffusion: {problem}",
            file=sys.stderr,
        )
        return 2
    table = Table()
    with torch.no_grad():
        compare_timestep_embedding(table, compvis)
        compare_ddim(table, compvis)
        compare_vae(table, compvis, arguments.narrow)
        compare_unet(table, compvis, arguments.narrow)
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
