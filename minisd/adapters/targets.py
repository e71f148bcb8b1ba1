"""Which layers a LoRA can change, and what every trainer calls each of them.

A LoRA file names layers, not weights, and each trainer spells the names its own way; kohya even writes `_` for every
dot, which cannot be undone by looking at a name ("to_out_0" is `to_out.0`, "proj_in" is `proj_in`). So names are never
decoded: the key table is walked forwards, every layer gets all of its names, and a file's names are looked up.
This file needs the standard library only. Next: `lora.py`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minisd.checkpoint.keymap import KEYS, Key, Shape
from minisd.checkpoint.naming import TEXT_PREFIX
from minisd.config import ModelConfig

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
TABLES = ("token_embedding.weight", "position_embedding.weight")  # of the text encoder: rows, not a layer
WEIGHT = ".weight"

# What diffusers' attention processors called the four matrices, before PEFT.
PROCESSORS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
TEXT_PROCESSORS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer or a convolution. `diffusers` and `compvis` are relative to the component, without ".weight"."""

    component: str
    minisd: str
    diffusers: str
    compvis: str
    shape: Shape  # of the weight: (out, in) or (out, in, height, width)

    @property
    def weight(self) -> tuple[str, str]:
        """The weight's component and minisd's name."""
        return self.component, self.minisd + WEIGHT


def targets(config: ModelConfig) -> Iterator[Target]:
    """Every layer that a LoRA can change: all linear layers and convolutions of the UNet and the text encoders."""
    for component in COMPONENTS:
        if (part := getattr(config, component)) is not None:
            yield from layers(component, KEYS[component](part))


def layers(component: str, keys: Iterable[Key]) -> Iterator[Target]:
    """Those of a component's keys that are layers' matrices."""
    for key in keys:
        if is_layer(key):
            ours, theirs, older = (name.removesuffix(WEIGHT) for name in (key.minisd, key.diffusers, key.compvis))
            yield Target(component, ours, theirs, older, key.shape)


def is_layer(key: Key) -> bool:
    """Is it the matrix of a linear layer or a convolution? (Norms have vectors.)"""
    return key.minisd.endswith(WEIGHT) and len(key.shape) >= 2 and key.minisd not in TABLES


def names(target: Target) -> Iterator[str]:
    """What the trainers call a layer, each name once: kohya's first."""
    return unet_names(target) if target.component == "unet" else text_names(target)


def unet_names(target: Target) -> Iterator[str]:
    """kohya | LyCORIS alone | kohya over CompVis' names | PEFT and diffusers, with and without prefix | processors."""
    yield f"lora_unet_{underscored(target.diffusers)}"
    yield f"lycoris_{underscored(target.diffusers)}"
    yield f"lora_unet_{underscored(target.compvis)}"
    yield f"diffusion_model.{target.compvis}"
    for name in (target.diffusers, *processor(target.diffusers, PROCESSORS, ".processor.")):
        yield from (f"unet.{name}", name, f"base_model.model.{name}", f"unet.base_model.model.{name}")


def text_names(target: Target) -> Iterator[str]:
    """The same for a text encoder, whose `text_model.` some releases of transformers have and some have not.

    Without any prefix only the long form is taken: `encoder.layers.0...` would be half of all transformers. And only
    for the first of two text encoders.
    """
    long, second = target.diffusers, target.component == "text_encoder_2"
    for name in (long, long.removeprefix(TEXT_PREFIX)):
        prefixes = ("lora_te2",) if second else ("lora_te", "lora_te1", "lycoris")
        yield from (f"{prefix}_{underscored(name)}" for prefix in prefixes)
        for spelling in (name, *processor(name, TEXT_PROCESSORS, ".")):
            yield f"{target.component}.{spelling}"
            yield f"{target.component}.base_model.model.{spelling}"
    if second:
        return
    for spelling in (long, *processor(long, TEXT_PROCESSORS, ".")):
        yield from (spelling, f"base_model.model.{spelling}")


def underscored(name: str) -> str:
    return name.replace(".", "_")


def processor(name: str, table: dict[str, str], joint: str) -> Iterator[str]:
    """The name that an attention matrix had when attention processors held the LoRA; nothing for other layers."""
    for ending, older in table.items():
        if name.endswith(f".{ending}"):
            yield f"{name.removesuffix(f'.{ending}')}{joint}{older}"


def table(every: Iterable[Target]) -> dict[str, Target]:
    """Any trainer's name -> the layer. Raises ValueError if a name could mean two layers (it cannot in SD 1.x)."""
    found: dict[str, Target] = {}
    for target in every:
        for name in names(target):
            if found.setdefault(name, target) is not target:
                raise ValueError(f"{name}: means {found[name].minisd} and {target.minisd}")
    return found
