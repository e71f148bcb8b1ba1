"""What the user named -> a file or a folder on this machine, fetched from the hub if need be.

`"emoji"` is the model that comes with minisd, `"sd15"` the hub repository of Stable Diffusion 1.5; anything else is a
path or a hub repository id. huggingface_hub does the fetching: its cache, its offline switch (HF_HUB_OFFLINE) and its
token apply. This file needs the standard library only, until something is fetched.
"""

import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from minisd.files import CheckpointError

SD15_REPOSITORY = "stable-diffusion-v1-5/stable-diffusion-v1-5"

GENERATION_CONFIG = "generation_config.json"  # the settings that a model's makers recommend

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
ALL_STEMS = {**STEMS, "text_encoder_2": "model"}  # with SDXL's


EMBEDDED = ("emoji", "fashion")  # the small trained models that come with minisd


def embedded_model(name: str = "emoji") -> Path:
    """The folder of a small trained model: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    places = (package / "weights" / name, package.parent / "weights" / name)
    for place in places:
        if (place / "unet").is_dir():
            return place
    raise FileNotFoundError(f"{places[0]}: the embedded model is missing from this installation")


def resolve(
    source: str | os.PathLike[str], *, half: bool = False, weights: str = "auto", component: str | None = None
) -> Path:
    """The local file or folder that `source` names.

    `half`, `weights` and `component` (all, or just one) decide which files are fetched from a hub.
    """
    name = os.fspath(source)
    if name in EMBEDDED:
        return embedded_model(name)
    if name == "sd15":
        name = SD15_REPOSITORY
    path = Path(os.path.expanduser(name))
    if os.path.lexists(path):
        return path
    owner, _, repository = name.partition("/")
    looks_like_hub = owner.lstrip(".") and owner[0] != "~" and repository and "/" not in repository
    if not looks_like_hub or path.suffix in (".safetensors", ".ckpt", ".pt", ".bin") or path.parent.is_dir():
        raise FileNotFoundError(
            f'{name}: no such file or folder (models by name: "emoji", "sd15", or a hub id OWNER/NAME)'
        )
    return from_hub(name, half=half, weights=weights, component=component)


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


def wanted_files(repository: str, names: list[str], *, half: bool, weights: str) -> list[str]:
    """Those `names` of files that make one model: configurations, tokenizer, one variant of each component."""
    wanted = [name for name in names if name.startswith(("tokenizer/", "tokenizer_2/"))]
    wanted += [name for name in ("scheduler/scheduler_config.json", GENERATION_CONFIG) if name in names]
    refiner = any(name.startswith("text_encoder_2/") for name in names)  # SDXL's has no other text encoder
    for component, stem in ALL_STEMS.items():
        if not any(name.startswith(f"{component}/") for name in names):
            if component not in STEMS or (component == "text_encoder" and refiner):
                continue
            raise CheckpointError(
                f"{repository}: has no {component}/{stem}.safetensors: it is not in diffusers' layout"
            )
        wanted += wanted_component(repository, names, component, half=half, weights=weights)
    return list(dict.fromkeys(wanted))


def wanted_component(repository: str, names: list[str], component: str, *, half: bool, weights: str) -> list[str]:
    """The files of one component: in its folder, or at the top of a repository that is this component alone."""
    folder = f"{component}/" if any(name.startswith(f"{component}/") for name in names) else ""
    here = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    stem = ALL_STEMS[component]
    variant = variant_of(here, stem, half=half, weights=weights)
    if variant is None:
        raise CheckpointError(f"{repository}: has no {folder}{stem}.safetensors: it is not in diffusers' layout")
    single, index = single_name(stem, variant), index_name(stem, variant)
    start = f"{stem}.{variant}-" if variant else f"{stem}-"
    shards = [name for name in here if name.startswith(start) and name.endswith(".safetensors")]
    wanted = [f"{folder}{name}" for name in ("config.json", *([single] if single in here else [index, *shards]))]
    return [name for name in (*wanted, "model_index.json") if name in names]


def from_hub(repository: str, *, half: bool, weights: str, component: str | None) -> Path:
    """Fetch what is needed of a hub repository into huggingface_hub's cache and return the snapshot's folder.

    Where the hub cannot be asked, what an earlier run fetched will do.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    try:
        if not HF_HUB_OFFLINE:
            return fetch(repository, half=half, weights=weights, component=component)
        reason = "no such file or folder, not in the cache, and the hub is switched off (HF_HUB_OFFLINE)"
    except CheckpointError:
        raise
    except Exception as error:  # the hub's, the HTTP library's (which differs between versions), the disk's
        reason = why_not_fetched(error)
    snapshot = cached(repository)
    if snapshot is None:
        raise CheckpointError(f"{repository}: {reason}")
    return snapshot


def fetch(repository: str, *, half: bool, weights: str, component: str | None) -> Path:
    """Ask the hub what there is, say how much of it is not here yet, fetch that."""
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    info = HfApi().model_info(repository, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    if component is None:
        wanted = wanted_files(repository, list(sizes), half=half, weights=weights)
    else:
        wanted = wanted_component(repository, list(sizes), component, half=half, weights=weights)
    places = {name: try_to_load_from_cache(repository, name, revision=info.sha) for name in wanted}
    absent = [name for name, place in places.items() if not isinstance(place, str)]
    if not absent:
        return Path(str(places[wanted[0]])).parents[wanted[0].count("/")]
    gigabytes = sum(sizes[name] for name in absent) / 1e9
    print(f"Fetching {repository}: {gigabytes:.2f} GB into {HF_HUB_CACHE}", file=sys.stderr)
    folder = Path(snapshot_download(repository, allow_patterns=wanted))
    promised = {file.rfilename: file.lfs.sha256 for file in info.siblings or [] if file.lfs}
    for name in absent:
        check_sum(repository, folder / name, promised.get(name))
    return folder


def check_sum(repository: str, path: Path, promised: str | None) -> None:
    """A fetched file must be what the hub says it is; what is not leaves the cache again."""
    if promised is None or sha256(path) == promised:
        return
    path.resolve().unlink()  # the content, to which the name in the snapshot is a link
    path.unlink(missing_ok=True)
    raise CheckpointError(f"{repository}: {path.name} is not what the hub promised (its sha256 differs): try again")


def sha256(path: Path) -> str:
    """The file's sum, in hexadecimal."""
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


def cached(repository: str) -> Path | None:
    """The snapshot that an earlier run fetched. Whether it is whole shows when it is read."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = (try_to_load_from_cache(repository, name) for name in ("model_index.json", "config.json"))
        return next((Path(place).parent for place in found if isinstance(place, str)), None)
    except HFValidationError:
        return None


def why_not_fetched(error: Exception) -> str:
    """The cause in one line, for people."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)

    if isinstance(error, HFValidationError):
        return "no such file or folder, and not a possible name of a hub repository"
    if isinstance(error, GatedRepoError):
        return "its owner asks you to agree to terms first: do so on its page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        return "no such file or folder here, and no such hub repository (or it is private: try `hf auth login`)"
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"no such file or folder, not in the cache, and cannot be fetched ({first_line})"
