"""A bug of one's choice, planted in a copy of a model and found again: how the lab works, on something known.

In: a bug's name (`bugs.py` has the list), a side to be A. Out: the verdict on A and the copy.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from minisd.checkpoint.hub import embedded_model
from minisd.lab.parity.bugs import planted
from minisd.lab.parity.compare import Progress
from minisd.lab.parity.opening import compare, open_side
from minisd.lab.parity.shadow import Observer
from minisd.lab.parity.sides import MinisdSide, minisd_side
from minisd.lab.parity.verdict import Verdict


def demonstrate(
    bug: str, a: str | None, case: Mapping[str, Any], progress: Progress, observe: Observer | None = None
) -> Verdict:
    """Compare A (by default the embedded model) with a copy of it in minisd that has a bug.

    Raises ValueError for a bug or a side that there is not.
    """
    reference = open_side(a or f"minisd:{embedded_model()}")
    sound = reference if isinstance(reference, MinisdSide) else minisd_side(path_of(a or ""))
    mutant, _ = planted(sound.model, bug)
    copy = MinisdSide(f"a copy with the bug {bug!r}", mutant, mutant.config)
    verdict = compare(reference, copy, case, progress=progress, observe=observe)
    verdict.command = shlex.join(["minisd", "parity", *([a] if a else []), "--demo", bug])
    return verdict


def path_of(side: str) -> str:
    """The path in diffusers:PATH. Raises ValueError for what has no weights to copy."""
    kind, _, path = side.partition(":")
    if kind != "diffusers":
        raise ValueError(f"{side}: a bug can be planted in a copy of minisd:PATH or diffusers:PATH only")
    return path
