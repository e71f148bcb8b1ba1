"""Weight files <-> minisd's modules.

`keymap.py` is the table: one weight, three names. `header.py` reads what a file claims, `naming.py` finds out which
tensor is which weight, `infer.py` and `configs.py` get the configuration, `schedule.py` the noise schedule; `survey.py`
puts them together: what a file is. `load.py` brings values into modules, `save.py` writes them. `hub.py` finds files.
For looking at single weights there is `minisd.checkpoint.open(path)`, in `lazy.py`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minisd.files import CheckpointError as CheckpointError

if TYPE_CHECKING:
    from minisd.checkpoint.lazy import open as open


def __getattr__(name: str) -> Any:
    """`open` comes with torch, which the errors and the key table do not need."""
    if name != "open":
        raise AttributeError(f"module 'minisd.checkpoint' has no attribute {name!r}")
    return import_module("minisd.checkpoint.lazy").open
