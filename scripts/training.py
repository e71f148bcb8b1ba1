"""What the training scripts share: processes, precision, learning rate, checkpoints, pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from minisd.backends.attention import plain

EMA_DECAY = 0.999


@dataclass(frozen=True)
class Team:
    """The processes that train together: one, or all that `torchrun` started.

    Each takes its share of every batch, and DistributedDataParallel averages the gradients, so a run is the same run,
    up to rounding, whatever the number of processes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True in the one process that writes files and shows progress."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch, on its device. The shares are equal: see `check_batch`."""
        return batch[self.rank :: self.size].to(self.device, non_blocking=True)

    def join(self, model: nn.Module) -> nn.Module:
        """`model` on this process's device, with gradients averaged over the team."""
        return DistributedDataParallel(model) if self.size > 1 else model

    def mean(self, value: Tensor) -> float:
        """The mean of a number over the team."""
        value = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def whole(self, part: Tensor) -> Tensor:
        """What was worked on in shares, as one: the inverse of `share`, in every process, on the CPU."""
        if self.size == 1:
            return part.cpu()
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part.cpu())
        joined = part.new_empty((sum(map(len, parts)), *part.shape[1:]), device="cpu")
        for rank, one in enumerate(parts):
            joined[rank :: self.size] = one
        return joined

    def wait(self) -> None:
        """Go on when all are here."""
        if self.size > 1:
            dist.barrier()

    def check_batch(self, batch: int) -> None:
        """Raise ValueError unless a batch falls into equal shares."""
        if batch % self.size:
            raise ValueError(f"--batch {batch}: must be a multiple of the number of processes ({self.size})")


@contextmanager
def gather_team() -> Iterator[Team]:
    """The team that this process belongs to, by the variables that `torchrun` sets."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Team(rank, size, device)
    finally:
        if size > 1:
            dist.destroy_process_group()


class PlainAttention(TorchFunctionMode):
    """For heads this small two matrix products are twice as fast on a CPU as any kernel of torch's for attention."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (plain if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


@contextmanager
def mixed_precision(device: torch.device) -> Iterator[None]:
    """bfloat16 where it is safe, with the fastest attention."""
    on_gpu = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    with torch.autocast(device.type, torch.bfloat16), PlainAttention() if device.type == "cpu" else on_gpu:
        yield


class Progress:
    """The steps of a run, with a bar that shows loss and images per second; every loss goes to `losses.csv`."""

    def __init__(self, folder: Path, team: Team, steps: range, batch: int) -> None:
        self.bar = tqdm(
            steps, initial=steps.start, total=steps.stop, unit="step", mininterval=2, disable=not team.leads
        )
        self.batch, self.recent = batch, math.nan
        self.file = (folder / "losses.csv").open("a", encoding="utf-8") if team.leads else None

    def __iter__(self) -> Iterator[int]:
        yield from self.bar
        if self.file:
            self.file.close()

    def note(self, step: int, loss: float) -> None:
        """Show and write the loss of a step; what is shown is an average over the last fifty or so."""
        self.recent = loss if math.isnan(self.recent) else 0.98 * self.recent + 0.02 * loss
        speed = self.batch * (self.bar.format_dict["rate"] or 0)
        self.bar.set_postfix_str(f"loss {self.recent:.4f}, {speed:.0f} images/s", refresh=False)
        if self.file:
            print(f"{step},{loss:.6f}", file=self.file, flush=True)


def learning_rate(step: int, *, peak: float, warmup: int, total: int) -> float:
    """Linear rise to `peak`, then half a cosine down to a fiftieth of it at step `total` (0-based)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, step: int) -> None:
    """Exponential moving average of the weights; young averages forget faster."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def save_checkpoint(path: Path, parts: Mapping[str, Any], step: int) -> None:
    """Write the state of every part, and the number of steps done. A crash leaves the old file whole."""
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": step, **state}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load_checkpoint(path: Path, parts: Mapping[str, Any]) -> int:
    """Load the state of every part in place; returns how many steps were done, 0 without a checkpoint."""
    if not path.is_file():
        return 0
    saved = torch.load(path, weights_only=True, map_location="cpu")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return int(saved["step"])


def to_picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a PIL picture."""
    pixels = ((image.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
