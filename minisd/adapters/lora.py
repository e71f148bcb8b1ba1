"""A LoRA file -> the changes that it makes, layer by layer.

    lora = open_lora("style.safetensors", sd.config)      # reads the header; says what does not fit, and why
    lora.changes["unet", "down.0.attention.cross_attn.q.weight"].delta()

Dialects: kohya's (with alpha, convolutions, Tucker cores; over diffusers' or CompVis' names), PEFT's and diffusers',
old diffusers'; beside plain LoRA also DoRA, LoHa and LoKr. Which layer a name means: `targets.py`. What is said beside
the tensors: `settings.py`. What a change does beside a layer: `factors.py`.
"""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minisd.adapters import factors as paths
from minisd.adapters.settings import MAX_ALPHA, Settings, number
from minisd.adapters.targets import Target, table, targets
from minisd.adapters.textual_inversion import read_vectors
from minisd.checkpoint.header import Files, open_files
from minisd.checkpoint.naming import same_but_for_ones, stranger
from minisd.checkpoint.values import DTYPES, read_tensor
from minisd.config import ModelConfig
from minisd.files import CheckpointError, shown

SHOWN = 4  # layers of a kind that an error names
WEIGHT_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # PEFT's, diffusers'
PICKLED_FILES = ("adapter_model.bin", "pytorch_lora_weights.bin")
BUNDLE = "bundle_emb."  # how the name of an embedding begins that is in a LoRA's file

# How the name of a tensor ends -> what it is to its layer. The first that fits counts: longer endings come first.
ROLES = {
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    "_lora.alpha": "alpha", ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector.default.weight": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    **{f".{name}": name for name in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2",
    )},
}  # fmt: skip

MAGNITUDES = ("magnitude", "dora_scale")  # PEFT's, always by output; LyCORIS', by whichever axis its shape says

# Relatives that change a model in other ways, by the endings of their tensors.
RELATIVES = {
    "GLoRA": (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"),
    "IA3": (".on_input", ".ia3_l"),
    "OFT (orthogonal fine-tuning)": (".oft_blocks", ".oft_diag", ".oft_R.weight"),
    "BOFT": (".boft_R", ".boft_s"),
    "full differences of weights (diff)": (".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight"),
    "a LoRA with biases": (".lora_B.bias", ".lora_up.bias"),
}

# What else a LoRA may have been trained on, by what only its names have; most telling first.
OTHER_MODELS = {
    "SDXL": ("lora_te2_", "text_encoder_2.", "_transformer_blocks_1_", ".transformer_blocks.1.", "add_embedding"),
    "Flux": ("double_blocks", "single_blocks", "single_transformer_blocks"),
    "SD 3": ("joint_blocks", "lora_te3_", "text_encoder_3."),
}
TEXT_WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}  # what cross-attention's keys take in


@dataclass(frozen=True)
class Change:
    """What a LoRA does to one layer, not yet read. `sources`: role (see ROLES) -> the tensor's name in the file."""

    target: Target
    files: Files
    sources: Mapping[str, str]
    alpha: float
    rank: int
    told: bool  # is the alpha said anywhere?

    def scaling(self, scale: float = 1.0) -> float:
        """What the product is multiplied by, `scale` being the user's."""
        return scale * self.alpha / self.rank

    def path(self) -> paths.Path:
        """The factors, float32, as they stand beside the layer."""
        parts = {role: self.read(role) for role in self.sources if role not in ("alpha", *MAGNITUDES)}
        if "down" in parts:
            return low_rank(self.target, parts)
        product = paths.hadamard(parts) if "hada_w1_a" in parts else paths.kronecker(parts)
        return paths.Whole(product.reshape(self.target.shape))

    def delta(self) -> Tensor:
        """What is added to the weight: float32, in its shape, alpha / rank included. Raises ValueError for DoRA."""
        if not self.sources.keys().isdisjoint(MAGNITUDES):
            raise ValueError(f"{self.target.minisd}: a DoRA's change depends on the weight: use `baked`")
        return self.path().product() * self.scaling()

    def baked(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """The changed weight, float32, in the shape of `weight`."""
        return baked_together(weight, [(self, scale)])

    def onto(self, changed: Tensor, base: Tensor, scale: float) -> Tensor:
        """`changed`, which is `base` with other changes, with this one too: what `hook` makes of the layer's output."""
        added = self.path().product().to(base.device) * self.scaling(scale)
        magnitude = self.magnitude()
        if magnitude is None:
            return changed + added
        stretch = paths.stretch(base + added, magnitude.to(base.device))
        if magnitude.shape[0] == 1:  # by input: a factor of the weight alone, not of the output
            return changed + ((base + added) * stretch - base)
        return (changed + added) * stretch

    def magnitude(self) -> Tensor | None:
        """DoRA's lengths, with size 1 on the axes along which they are taken: (out, 1) or, rarely, (1, in)."""
        role = next((role for role in MAGNITUDES if role in self.sources), None)
        if role is None:
            return None
        found, (out, width, *kernel) = self.read(role), self.target.shape
        if by_input(role, tuple(found.shape), self.target):
            return found.reshape(1, width, *[1] * len(kernel))
        return found.reshape(out, 1, *[1] * len(kernel))

    def read(self, role: str) -> Tensor:
        """A tensor, float32. Raises CheckpointError for NaN and infinity: one of them, and every picture is black."""
        name = self.sources[role]
        tensor = read_tensor(self.files, name).float()
        if not tensor.isfinite().all():
            raise CheckpointError(f"{self.files.path}: {name} holds NaN or infinite numbers: its training went wrong")
        return tensor


def baked_together(weight: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """A weight with several changes, (change, scale), in the order in which they were loaded: float32, in its shape.

    It is what the hooks say of a layer with this weight: each DoRA takes its lengths from the weight as it was.
    """
    base = weight.detach().float()
    changed = base
    for one, scale in changes:
        changed = one.onto(changed, base, scale)
    return changed


@dataclass(frozen=True)
class LoRA:
    """A LoRA that fits a model. `changes`: (component, minisd's name of the weight) -> what happens to it.

    `words`: the embeddings in its file, (n, D) by word.
    """

    path: FilePath
    changes: dict[tuple[str, str], Change]
    metadata: Mapping[str, str]
    words: dict[str, Tensor]

    def note(self) -> str | None:
        """What its user should know: that nothing says how strong it is meant to be."""
        if any(one.told for one in self.changes.values()):
            return None
        return f"{self.path}: says no alpha anywhere: its strength is taken to be alpha = rank; try other scales"


def low_rank(target: Target, parts: Mapping[str, Tensor]) -> paths.LowRank:
    """Factors in the shapes that the layer wants, whether a 1x1 kernel was written with its axes of size one or not."""
    down, up, mid = parts["down"], parts["up"], parts.get("mid")
    if len(target.shape) == 2:
        return paths.LowRank(down.flatten(1), up.flatten(1))
    kernel = (1, 1) if mid is not None else target.shape[2:]
    down = down.reshape(*down.shape[:2], *kernel)
    if mid is None and down.shape[1] < target.shape[1]:  # of a plain model, for an inpainting model: see `pads`
        down = F.pad(down, (0, 0, 0, 0, 0, target.shape[1] - down.shape[1]))
    return paths.LowRank(down, up.reshape(*up.shape[:2], 1, 1), mid)


# ---- opening ---------------------------------------------------------------------------------------------


def open_lora(path: str | os.PathLike[str], config: ModelConfig) -> LoRA:
    """Understand the LoRA at `path`, a safetensors file or a folder of PEFT's, for a model of this configuration.

    Only the header, the alphas and bundled embeddings are read. Raises FileNotFoundError for a path that is not there
    and CheckpointError for what is no LoRA, is a kind that minisd does not know, or does not fit the model: it says
    which layers and why.
    """
    path = FilePath(os.path.expanduser(path))
    file = in_folder(path) if path.is_dir() else path
    files = open_files([file], file)
    words = bundled(files, config.text_encoder.width)
    known = table(targets(config))
    grouped, strangers = group(files, known)
    if not grouped:
        raise CheckpointError(f"{file}: {nothing_known(files, strangers)}")
    misfits = [text for target, sources in grouped.items() if (text := misfit(target, sources, files))]
    if strangers or misfits:
        other = trained_on(files.tensors) or by_text_width(grouped, files)
        raise CheckpointError(does_not_fit(file, other, len(grouped), strangers, misfits))
    settings = Settings.read(files, file)
    settings.check(grouped, (role for sources in grouped.values() for role in sources))
    changes = {target.weight: change(target, sources, files, settings) for target, sources in grouped.items()}
    return LoRA(path, changes, files.metadata, words)


def in_folder(folder: FilePath) -> FilePath:
    """The adapter's file in a folder that PEFT or diffusers wrote. Raises CheckpointError if there is none."""
    for name in WEIGHT_FILES:
        if (folder / name).exists():
            return folder / name
    pickled = next((name for name in PICKLED_FILES if (folder / name).exists()), None)
    way = f"; `minisd convert --from-pickle` makes one of {pickled}" if pickled else ""
    raise CheckpointError(f"{folder}: is a folder without {' or '.join(WEIGHT_FILES)}{way}")


def bundled(files: Files, width: int) -> dict[str, Tensor]:
    """The embeddings that a LoRA was trained together with: "bundle_emb.WORD.string_to_param.*" -> vectors."""
    words: dict[str, Tensor] = {}
    for name in files.tensors:
        if name.startswith(BUNDLE):
            word, _, kind = name.removeprefix(BUNDLE).rpartition(".string_to_param.")
            word, kind = (word, kind) if word else name.removeprefix(BUNDLE).rpartition(".")[::2]
            if not word or kind == "clip_g" or word in words:
                raise CheckpointError(
                    f"{files.path}: the embedding in it, {shown(name)}, is none for SD 1.x: one text encoder's vectors "
                    "under a word were expected"
                )
            words[word] = read_vectors(files, name, width)
    return words


def group(files: Files, known: Mapping[str, Target]) -> tuple[dict[Target, dict[str, str]], list[str]]:
    """The file's tensors by layer and role, and the layers that the model does not have, by the file's names."""
    grouped: dict[Target, dict[str, str]] = defaultdict(dict)
    strangers: dict[str, None] = {}
    refuse_relatives(files, known)
    for name in files.tensors:
        if name.startswith(BUNDLE):
            continue
        layer, role = parsed(name)
        target = known.get(layer)
        if target is None:
            strangers[layer] = None
        elif role in grouped[target]:
            raise CheckpointError(f"{files.path}: {grouped[target][role]!r} and {name!r} are the same tensor")
        else:
            grouped[target][role] = name
    return dict(grouped), list(strangers)


def parsed(name: str) -> tuple[str, str]:
    """A tensor's name -> its layer's name and its role; ("the whole name", "") if it has none."""
    for ending, role in ROLES.items():
        if name.endswith(ending):
            return name.removesuffix(ending), role
    return name, ""


def refuse_relatives(files: Files, known: Mapping[str, Target]) -> None:
    """Raise CheckpointError for tensors of a relative of LoRA that minisd does not apply."""
    for name in files.tensors:
        for kind, endings in RELATIVES.items():
            if name.endswith(endings):
                raise CheckpointError(
                    f"{files.path}: is {kind} (it has {shown(name)!r}): minisd applies LoRA, LoCon, DoRA, LoHa and LoKr"
                )
    for name in files.tensors:
        layer, _, last = name.rpartition(".")
        if layer in known and last in ("weight", "bias"):
            kind = "biases (PEFT's bias)" if last == "bias" else "whole weights (PEFT's modules_to_save)"
            raise CheckpointError(
                f"{files.path}: is a LoRA with {kind} besides ({shown(name)!r}): minisd does not apply them"
            )


def nothing_known(files: Files, strangers: Iterable[str]) -> str:
    """What the file is instead of a LoRA for this model."""
    other = trained_on(files.tensors)
    if other:
        return f"is a LoRA for {other}: none of its layers is in this model"
    kind = stranger(files.tensors)
    if kind and "LoRA" not in kind:
        return f"is {kind}, not a LoRA"
    shown = ", ".join(list(strangers)[:SHOWN]) or "none"
    return f"is not a LoRA for this model: it knows none of its {len(files.tensors):,} tensors ({shown})"


def trained_on(names: Iterable[str]) -> str | None:
    """Another model that these names belong to, or None."""
    names = list(names)
    for model, marks in OTHER_MODELS.items():
        if any(mark in name for name in names for mark in marks):
            return model
    return None


def by_text_width(grouped: Mapping[Target, Mapping[str, str]], files: Files) -> str | None:
    """The model whose text is as wide as what these changes of cross-attention take in, if it is not SD 1.x."""
    for target, sources in grouped.items():
        if target.minisd.endswith("cross_attn.k") and "down" in sources:
            return TEXT_WIDTHS.get(files.tensors[sources["down"]].shape[-1])
    return None


def does_not_fit(file: FilePath, other: str | None, fitting: int, strangers: list[str], misfits: list[str]) -> str:
    """The error: how many layers of which kind, a few of each, and whose LoRA it probably is."""
    lines = [f"{file}: does not fit this model" + (f": it is a LoRA for {other}" if other else "")]
    for kind, rows in (("not in the model", strangers), ("of another shape", misfits)):
        if rows:
            more = f", and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
            share = f"{len(rows):,} of {fitting + len(strangers):,} layers"
            lines.append(f"{share} {kind}: {', '.join(rows[:SHOWN])}{more}")
    return "\n".join(lines)


# ---- does it fit? ----------------------------------------------------------------------------------------


def misfit(target: Target, sources: Mapping[str, str], files: Files) -> str | None:
    """Why these tensors cannot change this layer, in words; None if they can."""
    shapes = {role: files.tensors[name].shape for role, name in sources.items()}
    for role, name in sources.items():
        if role != "alpha" and files.tensors[name].dtype not in DTYPES:
            return f"{name} has the dtype {files.tensors[name].dtype}: weights are floating point"
    for role in MAGNITUDES:
        if role in shapes and math.prod(shapes[role]) != target.shape[by_input(role, shapes[role], target)]:
            return f"{target.minisd} has magnitudes {list(shapes[role])}"
    roles = shapes.keys()
    if {"down", "up"} <= roles:
        return misfit_low_rank(target, shapes)
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= roles or any(role.startswith("lokr") for role in roles):
        return misfit_product(target, sources, files)
    there = ", ".join(sorted(roles))
    return f"{target.minisd} is incomplete: there is only {there}"


def misfit_low_rank(target: Target, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The same for plain LoRA and LoCon."""
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    out, width, *kernel = target.shape
    if len(down) < 2 or len(up) < 2:
        return f"{target.minisd}: down {list(down)} and up {list(up)} are no matrices"
    if mid is None and pads(target, down[1]):
        width = down[1]
    ranks = (down[0], up[1]) if mid is None else (mid[1] if len(mid) == 4 else 0, mid[0])
    wanted = {
        "down": (down, (ranks[0], width, *(kernel if mid is None else []))),
        "up": (up, (out, ranks[1])),
        **({"mid": (mid, (ranks[1], ranks[0], *kernel))} if mid is not None else {}),
    }
    fits = all(same_but_for_ones(got, want) for got, want in wanted.values())
    if not fits or 0 in (*down, *up, *(mid or ())) or (mid is None and down[0] != up[1]):
        given = " and ".join(f"{role} {list(got)}" for role, (got, _) in wanted.items())
        return f"{target.minisd} ({target.shape[1]} in, {out} out) with {given}"
    return None


def by_input(role: str, shape: tuple[int, ...], target: Target) -> bool:
    """Does this DoRA give a length to each input, (1, in), in the place of each output?"""
    return role == "dora_scale" and len(shape) > 1 and shape[:2] == (1, target.shape[1])


def pads(target: Target, width: int) -> bool:
    """A LoRA of a plain model changes the first 4 of an inpainting model's 9 channels; mask and picture stay."""
    return target.minisd == "conv_in" and (width, target.shape[1]) == (4, 9)


def misfit_product(target: Target, sources: Mapping[str, str], files: Files) -> str | None:
    """The same for LoHa and LoKr, by the shapes of their factors."""
    shapes = {role: files.tensors[name].shape for role, name in sources.items() if role not in ("alpha", *MAGNITUDES)}
    shape = paths.hadamard_shape(shapes) if "hada_w1_a" in shapes else paths.kronecker_shape(shapes)
    if shape is not None and shape[0] == target.shape[0] and math.prod(shape) == math.prod(target.shape):
        return None
    given = ", ".join(f"{role} {list(each)}" for role, each in shapes.items())
    return f"{target.minisd} ({list(target.shape)}) does not come out of {given}"


# ---- alpha -----------------------------------------------------------------------------------------------


def change(target: Target, sources: Mapping[str, str], files: Files, settings: Settings) -> Change:
    """A layer's change with its scale: alpha / rank. Without alpha, or with an alpha of 0, that is 1."""
    product = "down" not in sources  # LoHa or LoKr
    rank = rank_of(sources, files) or settings.rank(target) or 1
    alpha = settings.alpha(target, rank, "alpha" if product else "lora_alpha")
    if "alpha" in sources:
        tensor = read_tensor(files, sources["alpha"])
        alpha = number(tensor.item()) if tensor.numel() == 1 else math.nan
        if {"lokr_w1", "lokr_w2"} <= sources.keys():  # LyCORIS: nothing is low-rank there, the alpha has no meaning
            alpha = float(rank)
    if alpha is not None and not math.isfinite(alpha):
        raise CheckpointError(
            f"{files.path}: the alpha of {target.minisd} is not a number, or beyond {MAX_ALPHA:,}: none is in use"
        )
    return Change(target, files, sources, float(alpha or rank), rank, told=alpha is not None)


def rank_of(sources: Mapping[str, str], files: Files) -> int | None:
    """The number of dimensions that a change has; None for a LoKr of two whole matrices."""
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in sources:
            return files.tensors[sources[role]].shape[0]
    return None


# ---- loaded into a model ---------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A LoRA at work: `remove` takes it away again."""

    lora: LoRA
    scale: float
    handles: list[RemovableHandle]

    def remove(self) -> None:
        """Leave the layers as they were."""
        for handle in self.handles:
            handle.remove()


def attach(lora: LoRA, modules: Mapping[str, nn.Module], scale: float) -> Loaded:
    """Put every change of a LoRA beside its layer. Everything is read before the first layer is touched.

    `modules`: "unet" and "text_encoder". Raises ValueError for a scale that is no number.
    """
    scale = paths.checked_scale(scale)
    beside = []
    for (component, name), one in lora.changes.items():
        layer = modules[component].get_submodule(name.removesuffix(".weight"))
        beside.append((layer, hook(one, layer.weight, scale)))  # type: ignore[arg-type]
    return Loaded(lora, scale, [layer.register_forward_hook(each) for layer, each in beside])


def hook(one: Change, weight: Tensor, scale: float) -> paths.Beside | paths.BesideWithMagnitude:
    """What stands beside a layer with this weight."""
    magnitude = one.magnitude()
    if magnitude is None:
        return paths.Beside(one.path().to(weight), one.scaling(scale))
    if magnitude.shape[0] == 1:  # by input: no factor of the output
        change = one.baked(weight, scale) - weight.detach().float()
        return paths.Beside(paths.Whole(change).to(weight), 1.0)
    return paths.BesideWithMagnitude(one.path().to(weight), one.scaling(scale), magnitude.to(weight))


def bake(states: Mapping[str, Mapping[str, Tensor]], loaded: Iterable[Loaded]) -> dict[str, dict[str, Tensor]]:
    """State dicts with LoRAs worked into them, all at once: in float32, but each weight keeps its dtype."""
    several: dict[tuple[str, str], list[tuple[Change, float]]] = defaultdict(list)
    for one in loaded:
        for weight, each in one.lora.changes.items():
            several[weight].append((each, one.scale))
    baked = {component: dict(state) for component, state in states.items()}
    for (component, name), changes in several.items():
        plain = baked[component][name]
        baked[component][name] = baked_together(plain, changes).to(plain.dtype)
    return baked
