"""Shards: a tar of webdataset, a folder or a parquet file of pictures, and beside it the file that says it is done.

A shard is written under a temporary name and renamed; `00012.json` (count, hash, settings, seconds) comes last: where
that file is, the shard is whole. Each picture is a PNG, its prompt (txt) and its settings (json), under one key.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minisd.batch.plan import FILE, Plan
from minisd.checkpoint.save import into_place
from minisd.files import read_json_object, write_whole

Sample = Mapping[str, bytes]  # "png", "txt" and "json" of one picture
Samples = Iterable[tuple[str, Sample]]  # with its key
PARTS = ("json", "png", "txt")
ABANDONED = 24 * 3600  # seconds


def write_tar(path: Path, samples: Samples) -> None:
    """webdataset's, with nothing in it that depends on time or user."""
    try:
        from webdataset import TarWriter
    except ImportError:
        raise ValueError("shards are tars of webdataset: pip install 'minisd[batch]', or --format folder") from None
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for key, sample in samples:
            tar.write({"__key__": key, **sample})


def write_folder(path: Path, samples: Samples) -> None:
    path.mkdir()
    for key, sample in samples:
        for part in PARTS:
            (path / f"{key}.{part}").write_bytes(sample[part])


def write_parquet(path: Path, samples: Samples) -> None:
    """A row a picture: `__key__`, `png` (bytes), `txt`, `json`."""
    try:
        from pyarrow import Table
        from pyarrow.parquet import write_table
    except ImportError:
        raise ValueError("--format parquet: needs pyarrow; pip install 'minisd[batch]'") from None
    rows = [
        {"__key__": key, "png": sample["png"], "txt": sample["txt"].decode(), "json": sample["json"].decode()}
        for key, sample in samples
    ]
    write_table(Table.from_pylist(rows), path)


FORMATS: dict[str, tuple[str, Callable[[Path, Samples], None]]] = {
    "tar": (".tar", write_tar),
    "folder": ("", write_folder),
    "parquet": (".parquet", write_parquet),
}


def name_of(shard: int) -> str:
    return f"{shard:05}"


def place(folder: Path, shard: int, kind: str) -> Path:
    """Where a shard is, or will be."""
    return folder / (name_of(shard) + FORMATS[kind][0])


def write_shard(folder: Path, shard: int, kind: str, samples: Samples, told: Callable[[], Mapping[str, Any]]) -> None:
    """Write a shard, then the file that says it is done, with its hash and what is `told` once it is there."""
    destination = place(folder, shard, kind)
    for left in folder.glob(f".{destination.name}-*"):  # by a process that was killed; a younger one may be at work
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    into_place(destination, lambda path: FORMATS[kind][1](path, samples))
    done = {"sha256": checksum(destination), **told()}
    write_whole(folder / f"{name_of(shard)}.json", json.dumps(done, indent=1).encode())


def checksum(path: Path) -> str:
    """Of a file, or of the names and bytes of all files in a folder."""
    digest = hashlib.sha256()
    for one in sorted(path.iterdir()) if path.is_dir() else [path]:
        digest.update(one.name.encode() if path.is_dir() else b"")
        with one.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def done(folder: Path, plan: Plan) -> dict[int, dict[str, Any]]:
    """The shards that are there, with what their files say."""
    kind = plan.settings["format"]
    return {
        shard: read_json_object(path)
        for shard in plan.shards
        if (path := folder / f"{name_of(shard)}.json").exists() and place(folder, shard, kind).exists()
    }


def status(folder: Path) -> dict[str, Any]:
    """What all workers have made of a folder so far. Raises ValueError for one that `minisd sample` did not make."""
    if not (folder / FILE).is_file():
        raise ValueError(f"{folder}: has no {FILE}; it was not made by minisd sample")
    told = read_json_object(folder / FILE)
    total = told["prompts"] * told["per_prompt"]
    shards = [read_json_object(path) for path in sorted(folder.glob("[0-9]*.json"))]
    pictures, seconds = sum(one["count"] for one in shards), sum(one["seconds"] for one in shards)
    return {
        "pictures": pictures,
        "of": total,
        "shards": len(shards),
        "of_shards": -(-total // told["shard_size"]),
        "pictures_a_second": round(pictures / seconds, 3) if seconds else None,
        "worker_seconds_left": round((total - pictures) * seconds / pictures) if pictures else None,
    }


def read_samples(folder: Path) -> Iterator[tuple[str, Sample]]:
    """Every picture of a folder of shards, in order: key, and its parts."""
    kind = read_json_object(folder / FILE)["format"]
    for path in sorted(folder.glob("[0-9]*.json")):
        yield from READ[kind](path.with_suffix(FORMATS[kind][0]))


def read_tar(path: Path) -> Iterator[tuple[str, Sample]]:
    import tarfile

    with tarfile.open(path) as tar:
        found: dict[str, dict[str, bytes]] = {}
        for member in tar:
            key, _, part = member.name.partition(".")
            file = tar.extractfile(member)
            found.setdefault(key, {})[part] = file.read() if file else b""
            if len(found[key]) == len(PARTS):
                yield key, found.pop(key)


def read_folder(path: Path) -> Iterator[tuple[str, Sample]]:
    for png in sorted(path.glob("*.png")):
        yield png.stem, {part: png.with_suffix(f".{part}").read_bytes() for part in PARTS}


def read_parquet(path: Path) -> Iterator[tuple[str, Sample]]:
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(path).iter_batches(64):
        for row in batch.to_pylist():
            yield row["__key__"], {"png": row["png"], "txt": row["txt"].encode(), "json": row["json"].encode()}


READ: dict[str, Callable[[Path], Iterator[tuple[str, Sample]]]] = {
    "tar": read_tar,
    "folder": read_folder,
    "parquet": read_parquet,
}
