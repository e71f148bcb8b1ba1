"""Engines: other ways to compute the same networks. The networks themselves know nothing of them.

| engine | what it changes |
|---|---|
| `exact` | nothing in float32 and float16; in bfloat16 on a CPU attention goes by rows |
| `fast` | float32 linear layers by oneDNN with packed weights (a second copy of them) |
| `openvino` | UNet and VAE decoder converted by OpenVINO, once for each shape |
| `compile` | UNet and VAE decoder through `torch.compile` |

This file needs the standard library only, until an engine is chosen: the command line reads `ENGINES`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ENGINES = ("exact", "fast", "openvino", "compile")


def check_engine(engine: str) -> None:
    """Raise ValueError for an engine that there is not, or that is not installed."""
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r}: must be one of {', '.join(ENGINES)}")
    if engine == "openvino" and find_spec("openvino") is None:
        raise ValueError("engine='openvino': OpenVINO is not installed; pip install 'minisd[openvino]'")


def prepare(engine: str, *networks: "nn.Module") -> None:
    """Let `networks` (the UNet, the VAE) work by `engine`, in place. Raises ValueError as `check_engine`."""
    from minisd.backends.attention import attend
    from minisd.layers import Attention

    check_engine(engine)
    for network in networks:
        for module in network.modules():
            if isinstance(module, Attention):
                module.attend = attend  # type: ignore[assignment]
    if engine != "exact":
        chosen: Any = import_module(f"minisd.backends.{engine}")
        for network in networks:
            chosen.prepare(network)
