"""Which tensor of which file is which weight: recognising what a checkpoint holds, from its headers alone.

A checkpoint is one file or several (shards, or the folders of diffusers' layout). Each component in it is found by the
overlap of its names with the key table, never by one magic key: people add prefixes, drop prefixes, and keep old names.
This file needs the standard library only. Next: `infer.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import permutations, product
from math import prod
from typing import Any

from minisd.checkpoint.header import TensorInfo
from minisd.checkpoint.keymap import Key, ema_name, model_keys, text_encoder_keys
from minisd.config import SD15
from minisd.files import CheckpointError, shown

Tensors = Mapping[str, TensorInfo]

TITLES = {  # the components, for people
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}

REFINER_PREFIX = "conditioner.embedders.0."

# The prefixes that files in circulation have. The first entry of each is canonical.
PREFIXES = {
    ("unet", "diffusers"): ("", "unet."),
    ("unet", "compvis"): ("model.diffusion_model.", "diffusion_model.", ""),
    ("vae", "diffusers"): ("", "vae.", "first_stage_model."),
    ("vae", "compvis"): ("first_stage_model.", "vae.", ""),
    ("text_encoder", "diffusers"): (
        "",
        "text_encoder.",
        "te.",
        "clip_l.",
        "cond_stage_model.transformer.",
        "cond_stage_model.",
        "conditioner.embedders.0.transformer.",
    ),
    ("text_encoder", "compvis"): ("cond_stage_model.", "", REFINER_PREFIX),  # OpenCLIP's names
    ("text_encoder_2", "diffusers"): ("", "text_encoder_2.", "te2.", "clip_g."),
    ("text_encoder_2", "compvis"): ("conditioner.embedders.1.",),
}

# What training frameworks put in front of everything (torch.nn.DataParallel, torch.compile), one around the other too.
FRAMEWORKS = ("module.", "_orig_mod.", "model.")
WRAPPERS = tuple("".join(some) for count in range(4) for some in permutations(FRAMEWORKS, count))

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # what weights can be

TEXT_PREFIX = "text_model."  # dropped by NovelAI-style files and by transformers 5.6 and later


@dataclass(frozen=True)
class Naming:
    """How a file names one component: `prefix` + the name in the `column` of the key table."""

    component: str
    column: str  # "diffusers", "compvis" or "ema"
    prefix: str
    bare_text: bool = False  # the text encoder's names lack "text_model."

    def names(self, key: Key) -> list[str]:
        """The names that the file may have for a key; the canonical one first."""
        if self.column == "ema":
            return [self.prefix + ema_name(key.compvis)]
        if self.column == "compvis":
            return [self.prefix + key.compvis]
        names = (key.diffusers, *key.older)
        return [self.prefix + (name.removeprefix(TEXT_PREFIX) if self.bare_text else name) for name in names]

    def shape(self, key: Key) -> tuple[int, ...]:
        return key.shape if self.column == "diffusers" else key.compvis_shape


def candidates(component: str) -> Iterable[Naming]:
    """Every naming that minisd knows for a component, canonical ones first."""
    for (name, column), prefixes in PREFIXES.items():
        if name == component:
            for wrapper, prefix in product(WRAPPERS, prefixes):
                for bare in (False, True) if component in TEXT_ENCODERS and column == "diffusers" else (False,):
                    yield Naming(component, column, wrapper + prefix, bare)
    if component == "unet":
        yield Naming(component, "ema", "")


OPENCLIP_MARK = "cond_stage_model.model.ln_final.weight"  # in every whole file of SD 2.x, and in no other
OPENCLIP = replace(SD15.text_encoder, layers=23, activation="gelu")


@cache
def known_keys(component: str, column: str) -> dict[str, Key]:
    """SD 1.5's keys of a component by minisd's name (or SD 2.x's): enough to recognise a file of any widths."""
    openclip = component == "text_encoder_2" or (component, column) == ("text_encoder", "compvis")
    keys = text_encoder_keys(OPENCLIP) if openclip else model_keys(SD15)[component]
    return {key.minisd: key for key in keys}


def namings(component: str, tensors: Tensors) -> dict[str, Naming]:
    """The namings under which `component` is in the file, best overlap for each of "raw" and "ema"; {} if it is not."""
    best: dict[str, tuple[int, Naming]] = {}
    begun = beginnings(tensors)
    for naming in candidates(component):
        if naming.prefix not in begun:
            continue
        keys = known_keys(component, naming.column).values()
        kind = "ema" if naming.column == "ema" else "raw"
        most = best.get(kind, (0,))[0]
        if most < len(keys):
            overlap = sum(any(name in tensors for name in naming.names(key)) for key in keys)
            if overlap > most:
                best[kind] = overlap, naming
    # A handful of equal names is chance: `conv_in.weight` is in the UNet, in the VAE's halves, in half of all networks.
    return {kind: naming for kind, (overlap, naming) in best.items() if overlap >= 16}


DOTS = 8  # in the longest prefix, behind the longest wrapper


def beginnings(names: Iterable[str]) -> set[str]:
    """Everything that ends in one of the first dots of a name: no other prefix can be theirs."""
    found = {""}
    for name in names:
        at = name.find(".")
        for _ in range(DOTS):
            if at < 0:
                break
            found.add(name[: at + 1])
            at = name.find(".", at + 1)
    return found


# What a file may hold beside the model: a label, why minisd can leave it, and the names. A name that ends in "." or
# "_" stands for all names that begin so.
IGNORABLE: tuple[tuple[str, str, frozenset[str]], ...] = tuple(
    (label, reason, frozenset(names.split()))
    for label, reason, names in (
        (
            "schedule buffers",
            "computed from the configuration",
            "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
            "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
            "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2",
        ),
        ("training buffers", "used by a training loss only", "lvlb_weights logvar scale_factor"),
        ("moving average", "the other set of UNet weights, or its counters", "model_ema."),
        ("trainer state", "left by the trainer", "global_step epoch callbacks. optimizer_states. lr_schedulers."),
        ("training loss", "the discriminator that trained the VAE", "first_stage_model.loss. loss."),
        (
            "the rest of CLIP",
            "Stable Diffusion uses the hidden states only",
            "cond_stage_model.logit_scale cond_stage_model.text_projection logit_scale text_projection.weight "
            "cond_stage_model.model.logit_scale cond_stage_model.model.text_projection "
            "cond_stage_model.transformer.text_projection.weight vision_model. visual_projection.weight "
            "conditioner.embedders.0.logit_scale conditioner.embedders.0.transformer.text_projection.weight "
            "conditioner.embedders.0.model.logit_scale conditioner.embedders.1.model.logit_scale",
        ),
        (
            "last layer of OpenCLIP",
            "SD 2.x uses what the one before gives",
            "cond_stage_model.model.transformer.resblocks.23.",
        ),
        ("ControlNet", "a model of its own", "control_model."),
        ("LoRA", "a change to the weights that is not applied", "lora_te_ lora_unet_"),
        ("textual inversion", "embeddings that are not applied", "embedding_manager."),
        ("sampler settings", "hints for samplers", "denoiser. v_pred ztsnr edm_"),
        ("8-bit settings", "minisd computes in full precision", "scaled_fp8 model.diffusion_model.scaled_fp8"),
    )
)


LABELS = {member: label for label, _, members in IGNORABLE for member in members}
BEGINNINGS = tuple(member for member in LABELS if member[-1] in "._")


def ignorable(name: str) -> str | None:
    """The class of leftovers that `name` belongs to, or None."""
    for wrapper in WRAPPERS:
        if not name.startswith(wrapper):
            continue
        bare = name.removeprefix(wrapper)
        if bare in LABELS:
            return LABELS[bare]
        if bare.startswith(BEGINNINGS):  # all at once: a file may have a million names
            return next(LABELS[beginning] for beginning in BEGINNINGS if bare.startswith(beginning))
    if name.endswith((".scale_input", ".input_scale")):
        return "8-bit settings"
    return "position ids" if name.endswith("embeddings.position_ids") else None


XL_MARK = "model.diffusion_model.label_emb.0.0.weight"  # in every whole file of SDXL, and in no other

PART_OF_XL = "a part of SDXL"

# What is not of this family, by the beginnings of names that only it has; most telling first.
STRANGERS = (
    (PART_OF_XL, "conditioner.embedders. model.diffusion_model.label_emb. add_embedding.linear_1.weight"),
    (
        "SD 3 or Flux",
        "model.diffusion_model.joint_blocks. joint_blocks. double_blocks. model.diffusion_model.double_blocks. "
        "transformer_blocks.0.attn.add_k_proj.",
    ),
    ("SD 2's depth model", "depth_model."),
    ("SD 2's upscaler", "low_scale_model."),
    ("an IP-Adapter", "ip_adapter. image_proj."),
    ("a ControlNet", "control_model. controlnet_cond_embedding. input_hint_block."),
    ("a TAESD autoencoder", "taesd_decoder. encoder.layers.0.weight decoder.layers.1.weight"),
)
LORA_MARKS = (
    ".lora_down. .lora_up. .lora_mid. .lora_A. .lora_B. _lora.down. _lora.up. .lora.down. .lora.up. .hada_w .lokr_w "
    ".lora_magnitude_vector"
).split()
LORA_PREFIXES = ("lycoris_", "lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
EMBEDDING_WIDTHS = (768, 1024, 1280)  # SD 1.x, SD 2.x, the second text encoder of SDXL


LORA, EMBEDDING = "a LoRA: a change to a model, not a model", "a textual inversion embedding"


def way_out(other: str) -> str:
    """What to do with a file that turned out to be something else."""
    hints = {
        PART_OF_XL: "its UNet is missing",
        LORA: "give it to load_lora() or --lora",
        EMBEDDING: "give it to load_embedding() or --embedding",
    }
    return hints.get(other, "minisd knows Stable Diffusion 1.x, 2.x and XL")


def is_lora(name: str) -> bool:
    return name.startswith(LORA_PREFIXES) or any(mark in name for mark in LORA_MARKS)


def is_embedding(tensors: Tensors) -> bool:
    """A few vectors of a width that text encoders have, and nothing else."""
    if {"emb_params", "clip_l", "clip_g"} & tensors.keys():
        return len(tensors) < 10
    shapes = [info.shape for info in tensors.values()]
    return 0 < len(shapes) < 10 and all(len(shape) in (1, 2) and shape[-1] in EMBEDDING_WIDTHS for shape in shapes)


def stranger(tensors: Tensors) -> str | None:
    """What else the file is, if it is not Stable Diffusion: a name for people, or None."""
    if tensors and sum(map(is_lora, tensors)) > len(tensors) // 3:
        return LORA
    if is_embedding(tensors):
        return EMBEDDING
    for label, marks in STRANGERS:
        marked = any(name.startswith(tuple(marks.split())) for name in tensors)
        # In a model a ControlNet is a leftover, and these names are in their place.
        if marked and not (label in ("a ControlNet", PART_OF_XL) and namings("unet", tensors)):
            return label
    return None


def shape_of(tensors: Tensors, naming: Naming, minisd_name: str) -> tuple[int, ...] | None:
    """The shape that the file gives to the weight that minisd calls so, or None."""
    key = known_keys(naming.component, naming.column)[minisd_name]
    return next((tensors[name].shape for name in naming.names(key) if name in tensors), None)


@dataclass(frozen=True)
class Match:
    """Where every weight of a component is: minisd's name -> (the file's name, the shape that the model wants).

    `scales`: minisd's name -> the tensor that an 8-bit weight has to be multiplied by.
    """

    naming: Naming
    sources: dict[str, tuple[str, tuple[int, ...]]]
    scales: dict[str, str]

    @property
    def used(self) -> set[str]:
        """The file's names of everything that the component needs."""
        return {name for name, _ in self.sources.values()} | set(self.scales.values())


def same_but_for_ones(file_shape: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Are they equal up to trailing axes of size one? (A 1x1 convolution is a linear layer; a column is no vector.)"""
    long, short = sorted((file_shape, shape), key=len, reverse=True)
    if len(short) < 2:
        return long == short
    return long[: len(short)] == short and all(n == 1 for n in long[len(short) :])


def match(keys: list[Key], tensors: Tensors, naming: Naming, problems: "Problems") -> Match:
    """Find each key's tensor in the file. What is wrong goes to `problems`."""
    sources, scales = {}, {}
    for key in keys:
        present = [name for name in naming.names(key) if name in tensors]
        if len(present) > 1:
            problems.twice.append((present[0], present[1]))
        if not present:
            problems.missing.append((naming.names(key)[0], f"{naming.component}.{key.minisd}"))
        elif not same_but_for_ones(tensors[present[0]].shape, key.shape):
            problems.shape.append((present[0], tensors[present[0]].shape, naming.shape(key)))
        elif tensors[present[0]].dtype not in FLOATS:
            problems.dtype.append((present[0], tensors[present[0]].dtype))
        elif (scale := scale_of(present[0], tensors)) and not scales_rows(tensors[scale], key.shape):
            problems.scale.append((scale, tensors[scale].shape, present[0]))
        else:
            sources[key.minisd] = present[0], key.shape
            if scale:
                scales[key.minisd] = scale
    return Match(naming, sources, scales)


def scale_of(name: str, tensors: Tensors) -> str | None:
    """The tensor that the 8-bit weight `name` has to be multiplied by: ComfyUI's name for it, or diffusers'."""
    if not tensors[name].dtype.startswith("F8"):
        return None
    names = (name.removesuffix(".weight") + end for end in (".scale_weight", ".weight_scale"))
    return next((scale for scale in names if scale in tensors), None)


def scales_rows(scale: TensorInfo, shape: tuple[int, ...]) -> bool:
    """Is it one floating-point number for the whole weight, or one for each row?"""
    rows = (1, shape[0]) if scale.shape else (1,)
    return scale.dtype in ("F32", "F16", "BF16", "F64") and prod(scale.shape) in rows and prod(scale.shape[1:]) == 1


@dataclass
class Problems:
    """Everything that keeps a checkpoint from loading, told together and shortly."""

    missing: list[tuple[str, str]] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shape: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    twice: list[tuple[str, str]] = field(default_factory=list)
    dtype: list[tuple[str, str]] = field(default_factory=list)
    scale: list[tuple[str, tuple[int, ...], str]] = field(default_factory=list)  # the last is the weight's name

    def add(self, other: "Problems") -> None:
        """Take the other's problems in."""
        for name, rows in vars(self).items():
            rows.extend(getattr(other, name))

    @property
    def names(self) -> set[str]:
        """The file's names of all that is there, but wrong."""
        names = [row[0] for row in self.shape] + [row[0] for row in self.dtype] + [row[0] for row in self.scale]
        return {*names, *(row[2] for row in self.scale), *(name for row in self.twice for name in row)}

    def raise_for(self, where: str) -> None:
        """Raise CheckpointError if there is any problem: a few of each kind, with how many there are in all."""
        kinds: tuple[tuple[str, Sequence[Any], Callable[[Any], str]], ...] = (
            ("missing", self.missing, lambda row: f"{row[0]}  (minisd: {row[1]})"),
            ("unexpected", self.unexpected, shown),
            (
                "of another shape",
                self.shape,
                lambda row: f"{row[0]}: {list(row[1])} in the file, {list(row[2])} in the model",
            ),
            ("there under two names", self.twice, " and ".join),
            ("in a dtype that is not floating point", self.dtype, ": ".join),
            (
                "with a scale that minisd does not understand",
                self.scale,
                lambda row: f"{row[0]} {list(row[1])} (known: one number, or one a row)",
            ),
        )
        counts = [f"{len(rows):,} tensor{'s' * (len(rows) > 1)} {kind}" for kind, rows, _ in kinds if rows]
        lines = [f"{where}: {', '.join(counts)}"]
        for kind, rows, words in kinds:
            lines += [f"  {kind}: {words(row)}" for row in rows[:4]]
            lines += [f"  {kind}: and {len(rows) - 4:,} more"] if len(rows) > 4 else []
        if len(lines) > 1:
            raise CheckpointError("\n".join(lines))
