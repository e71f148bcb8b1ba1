"""The file and line of a module's code. This file needs the standard library only."""

import inspect
import os
from functools import lru_cache
from typing import Any


@lru_cache
def located(function: Any) -> tuple[str, int] | None:
    """The file and line of a function; None where it has none."""
    try:
        return inspect.getsourcefile(function) or "?", inspect.getsourcelines(function)[1]
    except (TypeError, OSError):
        return None


def source_of(thing: Any) -> str:
    """file:line of a function, or of a module's `forward`; the file from its package on. "" where there is no file."""
    forward = getattr(thing, "forward", thing)
    found = located(inspect.unwrap(getattr(forward, "__func__", forward)))
    return f"{'/'.join(from_package(found[0].split(os.sep)))}:{found[1]}" if found else ""


def from_package(parts: list[str]) -> list[str]:
    """The end of a path that means something on another machine."""
    if "site-packages" in parts:
        return parts[parts.index("site-packages") + 1 :]
    if "minisd" in parts:
        return parts[len(parts) - 1 - parts[::-1].index("minisd") :]
    return parts[-3:]
