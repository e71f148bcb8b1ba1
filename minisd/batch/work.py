"""The work itself: the shards that are missing, made by this process, by one of several, or by Ray's workers.

A worker knows the order (what to make, of which model) and makes whole shards. Nothing is shared but the folder.
"""

import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minisd.batch.classes import ClassModel
from minisd.batch.plan import Item, Plan
from minisd.batch.prompts import Row
from minisd.batch.shards import Sample, done, write_shard
from minisd.metadata.writing import fingerprint
from minisd.pipeline import StableDiffusion
from minisd.sampling import Sampling

Told = Callable[[int], None]  # is called with how many pictures were made


@dataclass(frozen=True)
class Order:
    """What to make: `load`() gives the model; the rest as in `Plan`. `sampling` is for rows that say nothing else.

    `described`: the settings that belong into `sample.json`, JSON values. `threads`: of each worker.
    """

    load: Callable[[], "StableDiffusion | ClassModel"]
    rows: list[Row]
    sampling: Sampling
    folder: Path
    per_prompt: int
    shard_size: int
    batch: int
    seed: int
    threads: int
    described: Mapping[str, Any]

    @cached_property
    def sd(self) -> "StableDiffusion | ClassModel":
        """The model, loaded once a process, on as many threads as the plan says."""
        torch.set_num_threads(self.threads)
        return self.load()

    @cached_property
    def plan(self) -> Plan:
        """Also checks every row against the model. Raises ValueError for one that it cannot make."""
        steps, scale = self.sampling.steps_and_scale(self.sd.generation)
        _, *size = self.sd.latent_shape(self.sampling.height, self.sampling.width)
        height, width = (side * self.sd.vae.config.downsampling for side in size)
        alike = {(row.height, row.width, row.steps, row.prompt): row for row in reversed(self.rows)}
        for row in alike.values():
            try:
                self.sd.latent_shape(row.height, row.width)
                if isinstance(self.sd, ClassModel):
                    self.sd.check_prompt(row.prompt)
                if row.steps is not None:
                    self.sd.make_scheduler(self.sampling.scheduler, row.steps)
            except ValueError as error:
                raise ValueError(f"prompts, line {row.line}: {error}") from None
        own = {"steps": steps, "guidance_scale": scale, "height": height, "width": width, "threads": self.threads}
        settings = {**self.described, **own, "model_hash": fingerprint(self.sd)}
        return Plan(self.rows, self.per_prompt, self.shard_size, self.batch, self.seed, settings)


def missing(order: Order, worker: int, workers: int) -> list[int]:
    """The shards that worker `worker` (0, 1, ...) of `workers` has to make: each takes every `workers`th."""
    finished = done(order.folder, order.plan)
    return [shard for shard in order.plan.shards[worker::workers] if shard not in finished]


def run_here(order: Order, worker: int, workers: int, told: Told) -> None:
    """Make this worker's missing shards, in this process."""
    for shard in missing(order, worker, workers):
        make_shard(order, shard, told)


def make_shard(order: Order, shard: int, told: Told = lambda count: None) -> int:
    """Make one shard, whole, whoever asks; returns how many pictures it has."""
    started, count = time.perf_counter(), len(order.plan.items(shard))

    def samples() -> Iterator[tuple[str, Sample]]:
        for batch in order.plan.batches(shard):
            for item, picture in zip(batch, generate(order, batch), strict=True):
                yield item.key, as_sample(order, item, picture)
            told(len(batch))

    def done_file() -> dict[str, Any]:
        seconds = round(time.perf_counter() - started, 3)
        return {"count": count, "seconds": seconds, "worker": f"{socket.gethostname()}:{os.getpid()}"}

    write_shard(order.folder, shard, order.described["format"], samples(), done_file)
    return count


def generate(order: Order, batch: list[Item]) -> list[Image.Image]:
    """The pictures of one batch."""
    generators = [torch.Generator().manual_seed(item.seed) for item in batch]
    negatives = [settings_of(order, item)["negative_prompt"] for item in batch]
    first = settings_of(order, batch[0])
    own = {name: first[name] for name in ("steps", "guidance_scale", "height", "width")}
    sampling = replace(order.sampling, generator=generators, negative_prompt=negatives, **own)
    return order.sd.text_to_image([item.row.prompt for item in batch], sampling)


def settings_of(order: Order, item: Item) -> dict[str, Any]:
    """All that makes a picture: what its row says, else what is said for all."""
    own = {"negative_prompt": order.sampling.negative_prompt, **order.plan.settings}
    names = ("negative_prompt", "steps", "guidance_scale", "height", "width")
    given = {name: value for name in names if (value := getattr(item.row, name)) is not None}
    return {"prompt": item.row.prompt, "seed": item.seed, **{name: own[name] for name in names}, **given}


def as_sample(order: Order, item: Item, picture: Image.Image) -> dict[str, bytes]:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    told = json.dumps({"index": item.index, **settings_of(order, item)}, sort_keys=True)
    return {"png": data.getvalue(), "txt": item.row.prompt.encode(), "json": told.encode()}


# ---------------------------------------------------- Ray


def run_on_ray(order: Order, told: Told) -> None:
    """Make the missing shards as tasks of Ray: on the cluster that it finds, else on one that it starts here.

    A task whose worker dies is started again on another; shards that are done when the driver dies stay done.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--on ray: Ray is not installed; pip install 'minisd[ray]'") from None
    shards = missing(order, 0, 1)
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="error")
    try:
        gpus = 1 if order.described["device"].startswith("cuda") else 0
        remote = ray.remote(num_cpus=order.threads, num_gpus=gpus, max_retries=10)(make_remotely)
        shared = ray.put(replace(order))  # without what this process has loaded
        waiting = [remote.remote([shared], shard) for shard in shards]
        while waiting:
            finished, waiting = ray.wait(waiting)
            told(sum(ray.get(finished)))
    finally:
        ray.shutdown()


def make_remotely(shared: list[Any], shard: int) -> int:
    """Make one shard in a worker process of Ray, which loads the model once."""
    return make_shard(loaded(shared[0]), shard)


@lru_cache(maxsize=1)
def loaded(reference: Any) -> Order:
    """The order behind a reference, kept with its model for as long as the worker lives."""
    import ray

    order: Order = ray.get(reference)
    return order
