"""Which picture is made of what: everything about a run that is known before the first picture.

Picture i is the (i mod n)th of the n that row i // n asks for. Its seed, its shard and its batch follow from the plan
and i alone, so that pictures are the same, to the byte, whoever makes them. Kernels round by the size of a batch and by
the number of threads: both are settings too.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from minisd.batch.prompts import Row
from minisd.files import read_json_object, write_whole

FILE = "sample.json"  # what the folder's pictures are
SEEDS = 2**32


@dataclass(frozen=True)
class Item:
    """One picture."""

    index: int
    row: Row
    seed: int

    @property
    def key(self) -> str:
        return f"{self.index:09}"


@dataclass(frozen=True)
class Plan:
    """`settings`: all that pictures depend on besides, as it stands in `sample.json`."""

    rows: list[Row]
    per_prompt: int
    shard_size: int
    batch: int
    seed: int
    settings: Mapping[str, Any]

    @property
    def total(self) -> int:
        return len(self.rows) * self.per_prompt

    @property
    def shards(self) -> range:
        return range(-(-self.total // self.shard_size))

    def items(self, shard: int) -> list[Item]:
        """The pictures of a shard."""
        first = shard * self.shard_size
        return [self.item(index) for index in range(first, min(first + self.shard_size, self.total))]

    def item(self, index: int) -> Item:
        which, copy = divmod(index, self.per_prompt)
        row = self.rows[which]
        return Item(index, row, ((self.seed + index) if row.seed is None else (row.seed + copy)) % SEEDS)

    def batches(self, shard: int) -> Iterator[list[Item]]:
        """Runs of a shard's pictures that have the same settings, `batch` at most."""
        for _, group in groupby(self.items(shard), lambda item: own_settings(item.row)):
            alike = list(group)
            for first in range(0, len(alike), self.batch):
                yield alike[first : first + self.batch]

    def told(self) -> dict[str, Any]:
        """The content of `sample.json`."""
        rows = "\n".join(json.dumps(asdict(row)) for row in self.rows)
        own = {"per_prompt": self.per_prompt, "shard_size": self.shard_size, "batch": self.batch, "seed": self.seed}
        prompts = {"prompts": len(self.rows), "prompts_sha256": hashlib.sha256(rows.encode()).hexdigest()}
        return {**prompts, **own, **self.settings}

    def claim(self, folder: Path) -> None:
        """Write `sample.json`, or find that it is there. Raises ValueError where the folder is of another plan."""
        folder.mkdir(parents=True, exist_ok=True)
        path, told = folder / FILE, json.loads(json.dumps(self.told()))
        if not path.exists():
            if any(folder.iterdir()):
                raise ValueError(f"{folder}: is not empty, and was not made by minisd sample; name another folder")
            write_whole(path, json.dumps(told, indent=1).encode())
        found = read_json_object(path)
        names = [name for name in {**told, **found} if told.get(name) != found.get(name)]
        if names:
            differ = ", ".join(f"{name} {found.get(name)!r} there, {told.get(name)!r} asked for" for name in names)
            raise ValueError(f"{folder}: was begun with other settings ({differ}); name another folder")


def own_settings(row: Row) -> tuple[Any, ...]:
    """What pictures of one batch must share."""
    return row.steps, row.guidance_scale, row.width, row.height
