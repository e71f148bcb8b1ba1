"""Traces: what an implementation computed, in a file. The way to compare with code in any language.

A trace is a `.safetensors` file. Its metadata holds "minisd.trace" = "1" and, as JSON, "case" (prompts, negatives,
steps, guidance, height, width, seed), and may hold "config", "versions" and "side". Its tensors, all optional:

    tokens                  (2N, 77) whole numbers: the prompts, then the negative prompts
    text/context            (2N, 77, D) what the text encoder makes of `tokens`
    alphas_cumprod          (1000,)
    timesteps               (steps,)
    noise                   (N, C, h, w) what the loop starts from; then for each step I from 0:
    step.I/latents          (R, C, h, w) what goes into the UNet, with
    step.I/timestep         ()
    step.I/context          (R, 77, D)
    step.I/noise            (R, C, h, w) the UNet's noise prediction
    step.I/guided           (N, C, h, w) both halves combined
    step.I/sample           (N, C, h, w) the latents before the step
    step.I/previous         (N, C, h, w) the latents after it
    decode/z                (N, C, h, w) what goes into the VAE
    decode/images           (N, 3, H, W) what comes out, about in [-1, 1]
    pixels                  (N, H, W, 3) bytes
    STAGE/NAME              a module's output, STAGE as above (text, step.I, decode), NAME in any of the three dialects
    STAGE/NAME:K            its K-th tensor input, from 0

Whatever a tensor is computed from should be in the file too: a result is checked on the trace's own inputs, so that an
early mistake does not spoil what comes after it. A module with its inputs is checked alone; without, in its stage.
Results in float64 allow a verdict, others an R64: sameness is told only of a trace whose results all are in float64.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import minisd
from minisd.files import CheckpointError, write_whole
from minisd.lab.hooks import Listener
from minisd.lab.parity.calls import first_tensor, tensors_in
from minisd.lab.parity.cases import Case
from minisd.lab.parity.promote import float64
from minisd.lab.parity.sides import PipelineSide, Side

FORMAT = "minisd.trace"


@dataclass
class TraceSide(Side):
    """Tensors by name. `wide`: the same in float64, where the side has them."""

    name: str
    case: Case
    tensors: dict[str, Tensor]
    wide: dict[str, Tensor] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def versions(self) -> dict[str, str]:
        return {f"trace {name}": str(version) for name, version in self.about.get("versions", {}).items()}

    def best(self) -> dict[str, Tensor]:
        """Each tensor in the best precision that there is."""
        return {**self.tensors, **self.wide}


# ---- writing ---------------------------------------------------------------------------------------------


@torch.no_grad()
def record(side: PipelineSide, case: Case, *, exact: bool = False) -> dict[str, Tensor]:
    """Run a case on a live side and write everything down; with `exact` in float64.

    The modules of the text encoder, of the first step and of the decoder are there with their inputs.
    """
    latents = case.latents(side.config.vae.latent_channels, side.factor)
    if exact:
        with float64():
            return recorded(side, case, latents.double())
    return recorded(side, case, latents.to(side.dtype))


def recorded(side: PipelineSide, case: Case, latents: Tensor) -> dict[str, Tensor]:
    run = side.trajectory(case, latents)
    tokens = side.tokens([*case.prompts, *case.negatives])
    assert run.z is not None and run.images is not None
    told: dict[str, Tensor] = {"tokens": tokens, "noise": latents}
    told["alphas_cumprod"] = torch.as_tensor(side.scheduler().alphas_cumprod)
    told["timesteps"] = torch.stack([call.timestep.flatten()[0] for call in run.unet])
    with recording(side, "text_encoder", "text", told):
        told["text/context"] = side.embed(tokens)
    for index, (call, step) in enumerate(zip(run.unet, run.steps, strict=True)):
        here = f"step.{index}/"
        told |= {f"{here}latents": call.latents, f"{here}timestep": call.timestep, f"{here}context": call.context}
        told |= {f"{here}noise": call.noise, f"{here}guided": step.noise}
        told |= {f"{here}sample": step.sample, f"{here}previous": step.previous}
    first = run.unet[0]
    with recording(side, "unet", "step.0", told):
        told["step.0/noise"] = side.predict(first.latents, first.timestep, first.context)
    told["decode/z"] = run.z
    with recording(side, "vae", "decode", told):
        told["decode/images"] = side.decode(run.z)
    told["pixels"] = side.pixels(told["decode/images"].float())
    return {name: tensor.detach().contiguous().clone() for name, tensor in told.items()}


@contextmanager
def recording(side: PipelineSide, component: str, stage: str, told: dict[str, Tensor]) -> Iterator[None]:
    """Record the inputs and the output of every module of a component that has a name in the key table."""
    network = side.networks[component]

    def notes(name: str) -> Callable[[Any, Any, Any], None]:
        def hear(args: Any, kwargs: Any, output: Any) -> None:
            told[name] = first_tensor(output)
            told.update({f"{name}:{index}": tensor for index, tensor in enumerate(tensors_in((args, kwargs)))})

        return hear

    with Listener() as listener:
        for path, canonical in network.canonical.items():
            name = f"{stage}/{component}.{canonical}".rstrip(".")
            listener.after(network.root.get_submodule(path), notes(name))
        yield


def write(path: str | os.PathLike[str], side: PipelineSide, case: Case, *, exact: bool = False) -> int:
    """Write a trace, all or nothing; returns how many tensors it has. Raises ValueError for a path that will not do."""
    target = Path(path)
    if target.suffix != ".safetensors" or not target.parent.is_dir():
        raise ValueError(f"{target}: must be a name that ends in .safetensors, in a folder that exists")
    tensors = record(side, case, exact=exact)
    about = {
        "case": case.as_dict(),
        "versions": side.versions(),
        "side": side.name,
        "config": {name: vars(getattr(side.config, name)) for name in ("unet", "vae", "text_encoder")},
    }
    metadata = {FORMAT: "1", "minisd": minisd.__version__, **{name: json.dumps(value) for name, value in about.items()}}
    write_whole(target, save(tensors, metadata=metadata))
    return len(tensors)


# ---- reading ---------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], name: str | None = None) -> TraceSide:
    """Open a trace. Raises FileNotFoundError, or CheckpointError for a file that is none."""
    target = Path(os.path.expanduser(path))
    if not target.is_file():
        raise FileNotFoundError(f"{target}: there is no such file")
    try:
        with safe_open(target, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{target}: is not a safetensors file ({error})") from None
    if "case" not in metadata:
        raise CheckpointError(f'{target}: is no trace: its metadata has no "case" (see `minisd trace --help`)')
    about = {key: parsed(target, key, metadata[key]) for key in ("case", "versions", "config") if key in metadata}
    for key in ("versions", "config"):
        if not isinstance(about.get(key, {}), dict):
            raise CheckpointError(f"{target}: its metadata holds a broken {key!r} (must be a JSON object)")
    try:
        case = Case.from_dict(about["case"])
        check_types(about["case"])
    except ValueError as error:
        raise CheckpointError(f'{target}: its metadata holds a broken "case" ({error})') from None
    wide = {key: tensor for key, tensor in tensors.items() if tensor.dtype == torch.float64}
    return TraceSide(name or f"trace:{path}", case, tensors, wide, about)


KINDS: dict[str, Any] = {"steps": int, "height": int, "width": int, "seed": int, "guidance": (int, float)}


def check_types(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a case with "5" where 5 is meant, or a text where there must be several."""
    for name in ("prompts", "negatives"):
        texts = values.get(name, [])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} must be a list of texts")
    for name, kind in KINDS.items():
        value = values.get(name, 1)
        if not isinstance(value, kind) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, must be a {'whole ' if kind is int else ''}number")


def parsed(path: Path, key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        raise CheckpointError(f"{path}: its metadata holds a broken {key!r}") from None


def inputs_of(side: PipelineSide, case: Case) -> dict[str, Tensor]:
    """What a function that imitates a model may compute from: the inputs of every stage, from a live side's own run."""
    told = record(side, case, exact=True)
    wanted = ("tokens", "noise", "decode/z")
    parts = ("latents", "timestep", "context", "guided", "sample")
    return {
        name: tensor
        for name, tensor in told.items()
        if name in wanted or (name.startswith("step.") and name.rpartition("/")[2] in parts)
    }
