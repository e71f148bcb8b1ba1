"""What the user named -> a file or a folder on this machine, fetched from the hub if need be.

`"emoji"` is the model that comes with minisd, `"sd15"` the hub repository of Stable Diffusion 1.5; anything else is a
path or a hub repository id. huggingface_hub does the fetching: its cache, its offline switch (HF_HUB_OFFLINE) and its
token apply. This file needs the standard library only, until something is fetched.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from minisd.checkpoint.errors import CheckpointError

SD15_REPOSITORY = "stable-diffusion-v1-5/stable-diffusion-v1-5"

GENERATION_CONFIG = "generation_config.json"  # the settings that a model's makers recommend

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def embedded_model() -> Path:
    """The folder of the small trained model: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    places = (package / "weights" / "emoji", package.parent / "weights" / "emoji")
    for place in places:
        if (place / "unet").is_dir():
            return place
    raise FileNotFoundError(f"{places[0]}: the embedded model is missing from this installation")


def resolve(source: str | os.PathLike[str], *, half: bool = False, weights: str = "auto") -> Path:
    """The local file or folder that `source` names. `half` and `weights` decide which files are fetched from a hub."""
    name = os.fspath(source)
    if name == "emoji":
        return embedded_model()
    if name == "sd15":
        name = SD15_REPOSITORY
    path = Path(name).expanduser()
    if os.path.lexists(path):
        return path
    owner, _, repository = name.partition("/")
    looks_like_hub = owner not in ("", ".", "..", "~") and repository and "/" not in repository
    if not looks_like_hub or path.suffix in (".safetensors", ".ckpt", ".pt", ".bin") or path.parent.is_dir():
        raise FileNotFoundError(
            f'{name}: no such file or folder (models by name: "emoji", "sd15", or a hub id OWNER/NAME)'
        )
    return from_hub(name, half=half, weights=weights)


def variant_of(names: Iterable[str], stem: str, *, half: bool, weights: str) -> str | None:
    """Which of the files that stand side by side to take: "" for the plain one, "fp16", "non_ema", or None.

    Half precision is taken where it is asked for, or where there is nothing else; `non_ema` only for `weights="raw"`,
    or where there is nothing else.
    """
    names = set(names)
    order = ["", "fp16", "non_ema"]
    if half:
        order = ["fp16", "", "non_ema"]
    if weights == "raw":
        order.insert(0, "non_ema")
    for variant in order:
        if single_name(stem, variant) in names or index_name(stem, variant) in names:
            return variant
    return None


def single_name(stem: str, variant: str) -> str:
    return f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"


def index_name(stem: str, variant: str) -> str:
    """The table of shards. Mind the order: the variant comes after "index"."""
    return f"{stem}.safetensors.index.{variant}.json" if variant else f"{stem}.safetensors.index.json"


def wanted_files(names: list[str], *, half: bool, weights: str) -> list[str]:
    """The files of a repository that make one model: configurations, tokenizer, and one variant of each component."""
    wanted = [name for name in names if name.endswith("config.json") and name.count("/") == 1]
    wanted += [name for name in names if name.startswith("tokenizer/")] + ["model_index.json", GENERATION_CONFIG]
    for component, stem in STEMS.items():
        here = [name.partition("/")[2] for name in names if name.startswith(f"{component}/")]
        variant = variant_of(here, stem, half=half, weights=weights)
        if variant is None:
            raise CheckpointError(
                f"the repository has no {component}/{stem}.safetensors: it is not in diffusers' layout"
            )
        infix = f".{variant}-" if variant else "-"
        single, index = single_name(stem, variant), index_name(stem, variant)
        shards = [name for name in here if name.startswith(stem + infix) and name.endswith(".safetensors")]
        wanted += [f"{component}/{name}" for name in ([single] if single in here else [index, *shards])]
    skipped = ("safety_checker/", "feature_extractor/")
    return [name for name in dict.fromkeys(wanted) if name in names and not name.startswith(skipped)]


def from_hub(repository: str, *, half: bool, weights: str) -> Path:
    """Fetch what is needed of a hub repository into huggingface_hub's cache and return the snapshot's folder."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        if HF_HUB_OFFLINE:
            return Path(snapshot_download(repository, local_files_only=True))
        info = HfApi().model_info(repository, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        wanted = wanted_files(list(sizes), half=half, weights=weights)
        absent = [
            name for name in wanted if not isinstance(try_to_load_from_cache(repository, name, revision=info.sha), str)
        ]
        if absent:
            gigabytes = sum(sizes[name] for name in absent) / 1e9
            print(f"Fetching {repository}: {gigabytes:.2f} GB into {HF_HUB_CACHE}", file=sys.stderr)
        files = [hf_hub_download(repository, name, revision=info.sha) for name in wanted]
        return Path(files[0]).parents[wanted[0].count("/")]
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{repository}: no such file or folder here, and no such hub repository (or it is private)"
        ) from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repository}: not in the cache ({HF_HUB_CACHE}), and the hub is switched off or out of reach"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        try:  # out of reach: what an earlier run fetched will do
            return Path(snapshot_download(repository, local_files_only=True))
        except LocalEntryNotFoundError:
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{repository}: cannot be fetched ({first_line})") from None
