"""The key-mapping layer: real checkpoint files <-> minisd's models.

`keymap.py` is the table: one weight, three names. `header.py` and `files.py` read what files claim, `layouts.py` finds
out which tensor is which weight, `configs.py` translates configurations, `sources.py` finds files, `reading.py` and
`writing.py` move the values. `finding.py` and `lazy.py` are for looking: `minisd.checkpoint.open(path)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from minisd.checkpoint.errors import CheckpointError as CheckpointError

if TYPE_CHECKING:
    from minisd.checkpoint.lazy import open as open


def __getattr__(name: str) -> Any:
    """`open` comes with torch, which the errors and the key table do not need."""
    if name != "open":
        raise AttributeError(f"module 'minisd.checkpoint' has no attribute {name!r}")
    return import_module("minisd.checkpoint.lazy").open
