"""How much memory a comparison of two models will take, estimated before it starts.

Weights stay in their own precision (float64 is made one weight at a time), so what counts beside them is what the UNet
and the VAE hold at once in float64.
"""

import os

from minisd.lab.parity.cases import Case
from minisd.lab.parity.sides import PipelineSide

BASE = 700_000_000  # Python, torch and diffusers themselves
HELD = 60  # widest feature maps that are alive at once: skips, inputs that wait for their parents, the replay's own


def estimate(a: PipelineSide, b: PipelineSide, case: Case) -> int:
    """Bytes, a tenth more than counted: at SD 1.5's size that is 10.9 GB, where 10.2 GB were measured."""
    weights = sum(
        p.numel() * p.element_size() for side in (a, b) for n in side.networks.values() for p in n.root.parameters()
    )
    largest = max(p.numel() for side in (a, b) for n in side.networks.values() for p in n.root.parameters())
    rows, area = 2 * len(case.prompts), case.height * case.width
    unet = rows * a.config.unet.widths[0] * area // a.factor**2
    vae = len(case.prompts) * a.config.vae.widths[0] * area
    return int(1.1 * (BASE + weights + 8 * (largest + HELD * max(unet, vae // 4))))


def available() -> int | None:
    """Bytes of memory that are free, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def check_memory(a: PipelineSide, b: PipelineSide, case: Case) -> None:
    """Raise MemoryError, with the estimate, if it will not do."""
    need, have = estimate(a, b, case), available()
    if have is not None and need > have:
        raise MemoryError(
            f"out of memory: this comparison needs about {need / 1e9:.1f} GB and {have / 1e9:.1f} GB are free; "
            f"take a smaller --size than {case.width}x{case.height}"
        )
