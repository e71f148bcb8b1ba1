"""`save_pretrained`: parts and pipelines -> folders that diffusers loads too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minisd.checkpoint.hub import ALL_STEMS, single_name
from minisd.checkpoint.save import DIFFUSERS_VERSION, check_replaceable, into_place, plain, write_json, write_tensors
from minisd.diffusers.schedulers import UncoveredScheduler
from minisd.files import write_whole

NO_CHECKER = {"requires_safety_checker": False}


def save_network(folder: Path, network: Any, state: Mapping[str, Tensor], variant: str | None) -> None:
    """Write `state` and config.json into `folder`, each file whole or not at all."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is there and is no folder; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: plain(tensor, tuple(tensor.shape), None) for name, tensor in state.items()}
    into_place(
        folder / single_name(ALL_STEMS[network.component], variant or ""), lambda path: write_tensors(path, tensors, {})
    )
    write_whole(folder / "config.json", (json.dumps(network.config, indent=2) + "\n").encode())


def pipeline_index(pipeline: Any) -> dict[str, Any]:
    """model_index.json: the library and class of each part."""
    kinds: dict[str, Any] = {name: kind_of(part) for name, part in pipeline.components.items()}
    checker = NO_CHECKER if "safety_checker" in kinds else {}
    return {"_class_name": type(pipeline).__name__, **DIFFUSERS_VERSION, **kinds, **checker}


def kind_of(part: Any) -> list[str | None]:
    """A part's library and class; a scheduler that minisd has not is saved under its own name."""
    if part is None:
        return [None, None]
    kind = part.name if isinstance(part, UncoveredScheduler) else type(part).__name__
    return ["transformers" if kind.startswith("CLIP") else "diffusers", kind]


def save_pipeline(folder: Path, pipeline: Any, variant: str | None) -> None:
    """Write a pipeline's parts, then model_index.json, by which a folder is known to be whole."""
    check_replaceable(folder, file=False)
    into_place(folder, lambda new: write_pipeline(new, pipeline, variant))


def write_pipeline(folder: Path, pipeline: Any, variant: str | None) -> None:
    for name, part in pipeline.components.items():
        if isinstance(part, UncoveredScheduler):
            write_json(folder / name / "scheduler_config.json", {"_class_name": part.name, **part.config})
        elif part is not None:
            part.save_pretrained(folder / name, **({"variant": variant} if name in ALL_STEMS and variant else {}))
    pairs = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    for name, words in pairs.items():
        encoder, tokenizer = pipeline.components.get(name), pipeline.components.get(words)
        if encoder is not None and tokenizer is not None:  # added tokens may stand behind these
            ids = {token: getattr(tokenizer, token) for token in ("bos_token_id", "eos_token_id", "pad_token_id")}
            write_json(folder / name / "config.json", {**encoder.config, **ids})
    write_json(folder / "model_index.json", pipeline_index(pipeline))
