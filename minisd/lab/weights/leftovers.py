"""What travels with a model from file to file: the tensors beside it, its metadata, settings that shapes cannot tell.

A single file may hold schedule buffers, averages and counters beside the model; a folder has a file of its own for
them, `leftovers.safetensors`, which only minisd reads. Settings are written into a single file's metadata where the
file alone would be understood otherwise.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from minisd.checkpoint import configs
from minisd.checkpoint.header import Files, TensorInfo, open_files
from minisd.checkpoint.infer import INFER
from minisd.checkpoint.keymap import model_keys, prefixes
from minisd.checkpoint.load import Checkpoint, read_tokenizer
from minisd.checkpoint.naming import ignorable, namings
from minisd.checkpoint.save import modelspec_of, settings_as_metadata
from minisd.checkpoint.schedule import Stated, understand
from minisd.files import CheckpointError
from minisd.lab.weights.streaming import Entry

FILE = "leftovers.safetensors"
SETTINGS = ("minisd.config", "minisd.tokenizer", "minisd.generation")  # what `sd.save` writes into the metadata


def beside(checkpoint: Checkpoint) -> tuple[Files | None, dict[str, str]]:
    """The tensors beside a model, and the metadata of its file.

    Left behind are the set of UNet weights that was not chosen, if it bears the names that the chosen one gets, and the
    settings of 8-bit weights whose scales were applied.
    """
    if checkpoint.path.is_dir():
        path = checkpoint.path / FILE
        files = open_files([path], path) if path.is_file() else None
        return files, dict(files.metadata) if files else {}
    files = checkpoint.survey.sets[""]
    parts = checkpoint.components.values()
    gone = {name for part in parts for name in part.match.used}
    keys, prefix = model_keys(checkpoint.config), prefixes(vars(checkpoint.config))
    gone |= {prefix[component] + key.compvis for component, rows in keys.items() for key in rows}
    if any(part.match.scales for part in parts):
        gone |= {name for name in files.tensors if ignorable(name) == "8-bit settings"}
    rest = {name: info for name, info in files.tensors.items() if name not in gone}
    return Files(files.path, rest, files.location, files.metadata), dict(files.metadata)


def with_settings(
    metadata: Mapping[str, str],
    checkpoint: Checkpoint,
    entries: Sequence[Entry],
    others: Collection[str],
    title: str,
) -> dict[str, str]:
    """A single file's metadata, with the model's settings as they are now; without any where the shapes tell them.

    `entries`: the model's tensors in that file; `others`: the names of those beside it; `title`: what to call a model
    that has no title yet.
    """
    fresh = settings_as_metadata(checkpoint.config, read_tokenizer(checkpoint), checkpoint.generation)
    standard = modelspec_of(checkpoint.config, title)
    stored = {name: metadata[name] for name in SETTINGS if name in metadata}
    if {name: as_json(text) for name, text in stored.items()} == {name: as_json(text) for name, text in fresh.items()}:
        return dict(metadata)
    if (
        metadata
        and not stored
        and fresh.keys() == {"minisd.config"}
        and are_implied(checkpoint, metadata, entries, others)
    ):
        return dict(metadata)
    foreign = {name: text for name, text in metadata.items() if name not in SETTINGS}
    if foreign.keys() & standard.keys():  # it has a title and so on already; what it predicts may have changed
        standard = {"modelspec.prediction_type": standard["modelspec.prediction_type"]}
    return {"format": "pt"} | foreign | standard | fresh


def as_json(text: str) -> Any:
    """The value, or the text where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def are_implied(
    checkpoint: Checkpoint, metadata: Mapping[str, str], entries: Sequence[Entry], others: Collection[str]
) -> bool:
    """Would a reader of these tensors alone come to the same configuration and schedule?"""
    told = understand(Stated(None, "", others, metadata, None, None), None)
    return checkpoint.scheduler == told.settings and all(
        inferred(component, entries) == part.config for component, part in checkpoint.components.items()
    )


def inferred(component: str, entries: Sequence[Entry]) -> Any:
    """The configuration that the tensors' shapes tell; None where they do not."""
    tensors = {one.name: TensorInfo(one.dtype, one.shape, 0, 0) for one in entries}
    naming = namings(component, tensors).get("raw")
    try:
        return INFER[component](tensors, naming) if naming else None
    except CheckpointError:
        return None


def of_component(component: str, config: Any, entries: Sequence[Entry]) -> dict[str, str]:
    """The metadata of a file of one component: its configuration, unless its shapes tell it."""
    if inferred(component, entries) == config:
        return {}
    return {"format": "pt", "minisd.config": json.dumps({component: configs.WRITERS[component](config)})}
