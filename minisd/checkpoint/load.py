"""A checkpoint -> configuration, modules and a tokenizer, without a second copy of the weights.

What a file is was settled in `survey.py`, from headers; here values come in, memory-mapped and one tensor at a time.
Reading is strict: every weight of the model is filled exactly once, and every other tensor of a model's files is in a
known class of leftovers or an error. Next: `save.py`, the way back.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minisd.checkpoint import tokenizer_files
from minisd.checkpoint.naming import TITLES
from minisd.checkpoint.survey import Part, Survey, check_fit, check_tokenizer, described, survey
from minisd.checkpoint.values import Values
from minisd.config import ModelConfig
from minisd.files import CheckpointError
from minisd.notebook import table
from minisd.tokenizer import CLIPTokenizer, usual_padding

Source = str | os.PathLike[str]
Network = TypeVar("Network", bound=nn.Module)


@dataclass
class Checkpoint:
    """A whole model, understood but not yet read. `notes` are sentences that a person should see."""

    path: Path
    components: dict[str, Part]
    scheduler: Mapping[str, Any]
    survey: Survey
    notes: list[str] = field(default_factory=list)
    generation: Mapping[str, Any] = field(default_factory=dict)  # recommended settings: steps, guidance_scale
    tokenizer: Source | CLIPTokenizer | None = None  # replaces the model's own

    @property
    def config(self) -> ModelConfig:
        parts = {name: component.config for name, component in self.components.items()}
        return ModelConfig(**{"text_encoder_2": None, **parts}, scheduler=self.scheduler)

    def _repr_html_(self) -> str:
        """In a notebook: where it lies, and what is in it."""
        scheduler = {name: value for name, value in self.scheduler.items() if not isinstance(value, list)}
        return table(str(self.path), {"components": ", ".join(self.components), **scheduler, **self.generation})


def open_checkpoint(
    source: Source,
    *,
    dtype: torch.dtype | None,
    weights: str = "auto",
    vae: Source | None = None,
    tokenizer: Source | CLIPTokenizer | None = None,
    prediction: str | None = None,
) -> Checkpoint:
    """Understand `source` (see `hub.resolve`) from its headers. `dtype` decides which variant of a file is taken.

    `vae`, `tokenizer`: what replaces the model's own. `prediction`: "epsilon", "v_prediction" or "sample", where the
    files do not say what the UNet predicts, or say it wrongly. Raises FileNotFoundError for a path that is not there,
    CheckpointError for anything that cannot be loaded.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype={dtype}: must be a floating-point torch.dtype, or None for the file's own")
    half = dtype in (torch.float16, torch.bfloat16)
    found = survey(source, half=half, weights=weights, prediction=prediction)
    parts = found.whole(weights, elsewhere=() if vae is None else ("vae",))
    notes = list(found.notes)
    if vae is not None:
        parts["vae"] = open_alone(vae, "vae", half=half, notes=notes)
    checkpoint = Checkpoint(found.path, parts, found.schedule.settings, found, notes, found.generation, tokenizer)
    check_parts(checkpoint)
    return checkpoint


def check_parts(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError where the components do not fit together."""
    check_fit(checkpoint.path, {name: part.config for name, part in checkpoint.components.items()})


def open_alone(
    source: Source, name: str, *, half: bool = False, weights: str = "auto", notes: list[str] | None = None
) -> Part:
    """One component: of its folder, of a file that holds it alone, or of a whole checkpoint.

    `half`, `weights`: which variant of the files. What a person should see is added to `notes`. Raises as
    `open_checkpoint`.
    """
    found = survey(source, half=half, weights=weights, only=name)
    part = found.chosen(weights).get(name)
    if part is None:
        files = next(iter(found.sets.values()))
        raise CheckpointError(f"{files.path}: does not hold a {TITLES[name]}{described(files)}")
    if part.flaw:
        raise CheckpointError(part.flaw)
    if found.path.is_dir():
        found.check_complete(part.files, [part])
    part.problems.raise_for(str(part.files.path))
    if notes is not None:
        notes += found.notes if found.path.is_dir() else part.notes
    return part


def read_state(part: Part, *, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
    """A component's state dict under minisd's names: memory-mapped where nothing has to be converted.

    `dtype=None` keeps the dtype that most of the component's tensors have; 8-bit floats become float32.
    """
    values = Values(part.files, part.match)
    if dtype is None:
        dtype = Counter(values.dtype(name) for name in values).most_common(1)[0][0]
    return {name: read_as(values, name, dtype).to(device) for name in values}


def read_as(values: Values, name: str, dtype: torch.dtype) -> Tensor:
    """A weight in `dtype`; of what has another in the file, no more than a piece is in memory beside it."""
    if values.dtype(name) == dtype:
        return values[name]
    weight = torch.empty(values.shape(name), dtype=dtype)
    for rows, piece in values.pieces(name):
        weight[rows] = piece
    return weight


def build(network: Callable[[Any], Network], part: Part, dtype: torch.dtype | None, device: torch.device) -> Network:
    """Make a network of the component's configuration and give it the component's weights."""
    with torch.device("meta"), NoInitialValues():  # shapes without memory: the file's memory becomes the weights
        module = network(part.config)
    module.load_state_dict(read_state(part, dtype=dtype, device=device), strict=True, assign=True)
    favour_channels_last(module.eval())
    return module


class NoInitialValues(TorchFunctionMode):
    """Modules built under this are not initialised, which for tensors on the meta device costs a second of imports."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def favour_channels_last(module: nn.Module) -> None:
    """On a CPU, bfloat16 convolutions are faster with channels last: 1.25 times for the UNet, twice for the VAE."""
    weight = next(module.parameters())
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def usable_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it. Raises ValueError otherwise."""
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()  # the "meta" device makes tensors, but they hold nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used here: {str(error).partition('. ')[0]}") from None
    return device


def read_tokenizer(checkpoint: Checkpoint) -> CLIPTokenizer:
    """The tokenizer asked for, the checkpoint's own, or CLIP's; its ids must fit the text encoder."""
    if isinstance(checkpoint.tokenizer, CLIPTokenizer):
        found = checkpoint.tokenizer
    elif checkpoint.tokenizer is not None:
        found = load_tokenizer(checkpoint.tokenizer)
    elif (own := checkpoint.survey.tokenizer()) is not None:
        found = CLIPTokenizer(**vars(own))
    else:
        found = CLIPTokenizer.clip(usual_padding(checkpoint.config.text_encoder))
    check_tokenizer(checkpoint.path, found, checkpoint.config.text_encoder)
    return found


def load_tokenizer(folder: Source) -> CLIPTokenizer:
    """The tokenizer in a folder: `tokenizer.json`, or `vocab.json` and `merges.txt`. Raises CheckpointError."""
    return CLIPTokenizer(**vars(tokenizer_files.read_folder(folder)))
