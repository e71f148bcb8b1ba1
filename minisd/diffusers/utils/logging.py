"""diffusers' switches for how much is said. minisd warns with Python's `warnings`, which have switches of their own."""

import logging as standard
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, WARNING
from logging import getLogger as get_logger

__all__ = [
    "CRITICAL", "DEBUG", "ERROR", "FATAL", "INFO", "WARNING", "get_logger", "get_verbosity", "set_verbosity",
    "set_verbosity_debug", "set_verbosity_error", "set_verbosity_info", "set_verbosity_warning",
]  # fmt: skip

ROOT = standard.getLogger("minisd")


def get_verbosity() -> int:
    return ROOT.getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    ROOT.setLevel(verbosity)


def set_verbosity_error() -> None:
    set_verbosity(ERROR)


def set_verbosity_warning() -> None:
    set_verbosity(WARNING)


def set_verbosity_info() -> None:
    set_verbosity(INFO)


def set_verbosity_debug() -> None:
    set_verbosity(DEBUG)


def disable_progress_bar() -> None:
    """No effect: a pipeline's own `set_progress_bar_config(disable=True)` is what counts for its steps."""


enable_progress_bar = disable_progress_bar
