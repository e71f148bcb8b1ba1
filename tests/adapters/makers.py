"""LoRA files in every dialect, with random values, under names that were pinned from other projects."""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minisd.checkpoint.keymap import KEYS
from minisd.config import ModelConfig

# component -> diffusers' path -> {"shape", "kohya", "kohya_ldm", "peft", "old_diffusers"}, of SD 1.5
REFERENCE = json.loads(gzip.decompress((Path(__file__).parents[1] / "data" / "sd15_lora_targets.json.gz").read_bytes()))

ENDINGS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "kohya_ldm": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "peft, default": (".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers": (".lora.down.weight", ".lora.up.weight"),
    "old_diffusers": (".down.weight", ".up.weight"),
}
LINEAR = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")  # diffusers, in the text encoder
OLD_TEXT = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}

Pick = Callable[[str], bool]  # told diffusers' path


def everything(_: str) -> bool:
    return True


def attention(path: str) -> bool:
    return "attn" in path


def shapes(config: ModelConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Component, diffusers' path and weight shape of each layer, in this model's widths."""
    for component, rows in REFERENCE.items():
        found = {key.diffusers: key.shape for key in KEYS[component](getattr(config, component))}
        for path in rows:
            if f"{path}.weight" in found:
                yield component, path, found[f"{path}.weight"]


def called(dialect: str, component: str, path: str) -> str | None:
    """What a dialect calls a layer; None where it has no name for it."""
    row = REFERENCE[component][path]
    if component == "text_encoder" and dialect == "kohya_ldm":
        return row["kohya"]
    if component == "text_encoder" and dialect == "old_diffusers":
        layer, _, last = row["peft"].rpartition(".")
        return f"{layer}.{OLD_TEXT[last]}" if last in OLD_TEXT else None
    return row.get(dialect.split(",")[0] if dialect != "diffusers" else "peft")


def lora(
    config: ModelConfig,
    dialect: str = "kohya",
    *,
    pick: Pick = attention,
    rank: int = 4,
    alpha: float | None = 2.0,
    spread: float = 0.2,
    seed: int = 0,
    only: str | None = None,
) -> dict[str, Tensor]:
    """The tensors of a random LoRA. The values of a layer do not depend on the dialect."""
    tensors = {}
    for number, (component, path, (out, width, *kernel)) in enumerate(shapes(config)):
        name = called(dialect, component, path)
        if name is None or not pick(path) or only not in (None, component):
            continue
        generator = torch.Generator().manual_seed(1000 * seed + number)
        down, up = LINEAR if dialect == "diffusers" and component == "text_encoder" else ENDINGS[dialect]
        tensors[name + down] = spread * torch.randn(rank, width, *kernel, generator=generator)
        tensors[name + up] = spread * torch.randn(out, rank, *[1] * len(kernel), generator=generator)
        if alpha is not None and dialect.startswith("kohya"):
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path
