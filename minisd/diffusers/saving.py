"""`save_pretrained`: parts and pipelines -> folders that diffusers loads too."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minisd.checkpoint.hub import STEMS, single_name
from minisd.checkpoint.save import into_place, plain, write_tensors
from minisd.files import write_whole


def save_network(folder: Path, network: Any, state: Mapping[str, Tensor], variant: str | None) -> None:
    """Write `state` and config.json into `folder`, each file whole or not at all."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: is there and is no folder; choose another name")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: plain(tensor, tuple(tensor.shape), None) for name, tensor in state.items()}
    into_place(
        folder / single_name(STEMS[network.component], variant or ""), lambda path: write_tensors(path, tensors, {})
    )
    write_whole(folder / "config.json", (json.dumps(network.config, indent=2) + "\n").encode())
