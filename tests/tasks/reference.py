"""diffusers' pipelines for the tasks, put together from the narrow twin's parts."""

import numpy as np


def pipeline(kind, twin, **changes):
    """A pipeline of diffusers' class `kind`; `changes` replace parts, or numbers of the scheduler."""
    parts = {**twin[0].components, **{name: part for name, part in changes.items() if name in twin[0].components}}
    made = kind(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def same(mine: list, theirs: list) -> bool:
    return len(mine) == len(theirs) and all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(mine, theirs, strict=True)
    )
