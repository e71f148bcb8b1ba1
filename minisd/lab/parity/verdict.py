"""The result of a comparison, from which the terminal's text, JSON and the HTML report are made.

The rule, which has nothing to tune. Each part of the candidate B gets, in float64, the inputs that the reference A's
twin got. Their difference is compared with A's own rounding:

    floor       how far A in its working precision is from A in float64, on this input
    relative64  |B64 - A64|, how far the two functions are apart; both are relative to A64's largest value
    limit       the floor brought down to float64, half of the way on a logarithmic scale: a difference below is nearer
                to float64's rounding than to the working precision's
    R64         |B - A64| / |A - A64| in working precision: how many times A's own rounding error B is away

`relative64` at most `limit`: the same function, and whatever is left in the working precision is rounding.

This file needs the standard library only.
"""

import math
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any

from minisd.notebook import table

SAME = "same function"
PRECISION = "same function, other precision"
DIFFERENT = "different function"
UNKNOWN = "cannot tell"
EXIT_STATUS = {SAME: 0, PRECISION: 0, DIFFERENT: 1, UNKNOWN: 2}

EPS64 = 2.0**-52
ROUNDED = "the same rounded to "  # how an `Attribute` says that one weight is the other's in a coarser dtype


def limit(floor: float, eps: float) -> float:
    """The largest relative difference in float64 that is still rounding. `eps`: of the working precision.

    A floor below half of eps is an accident, one above its square root a broken reference: neither may move the limit.
    """
    floor = min(max(floor, eps / 2), math.sqrt(eps)) if math.isfinite(floor) else math.sqrt(eps)
    return floor * math.sqrt(EPS64 / eps)


@dataclass
class Attribute:
    """Something that twins do not have in common: an epsilon, a weight, a dtype, their code."""

    what: str  # "eps", "weight", "computes in", "forward", ...
    a: str
    b: str

    def __str__(self) -> str:
        return f"{self.what} {self.a} (A), {self.b} (B)"


@dataclass
class Finding:
    """What was measured at one place of both sides. Numbers that were not measured are None."""

    name: str
    _: KW_ONLY
    status: str = SAME  # SAME, PRECISION, DIFFERENT, UNKNOWN
    relative64: float | None = (
        None  # |B64 - A64| on A's inputs, relative to A64's largest value; the worst of all calls
    )
    limit: float | None = None  # what relative64 may be
    absmax: float | None = None  # the largest |B64 - A64|; for exact rungs, how many values differ
    floor: float | None = None  # A's own rounding, relative; of a rung, up to here in A's whole run
    error: float | None = None  # B's distance from A64, relative; of a rung, up to here in B's whole run
    r64: float | None = None  # error / floor
    culprit: bool = False  # differs although everything that it is made from is the same
    note: str = ""


@dataclass
class Rung(Finding):
    """One stage between the prompt and the pixels, in the order of computation.

    Names: "tokens", "text embedding", "UNet, step 0", "latents, step 0", "VAE decode", "pixels", ...
    """

    kind: str  # "exact" (integers), "network" or "glue" (what is computed between the networks)


@dataclass
class ModulePair(Finding):
    """A module of A and its counterpart in B. `name`: minisd's, beginning with the component; else A's own path."""

    a: str  # the path in A
    b: str  # the path in B
    parent: str  # the name of the pair around it, or ""
    a_class: str = ""
    b_class: str = ""
    a_source: str = ""  # file:line
    b_source: str = ""
    a_dtype: str = ""  # what it computes in, such as "float32" or "float16, float32"
    b_dtype: str = ""
    calls: int = 0
    stage: str = ""  # the rung of the worst call
    attributes: list[Attribute] = field(default_factory=list)


@dataclass
class Matrix:
    """Steps x blocks. A cell is None where a block was not called, or not compared."""

    stages: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    r64: list[list[float | None]] = field(default_factory=list)  # [stage][block]
    relative64: list[list[float | None]] = field(default_factory=list)


@dataclass
class Verdict:
    """The whole result."""

    word: str  # SAME, PRECISION, DIFFERENT or UNKNOWN
    sentence: str
    a: str  # the two sides, as they were named
    b: str
    cause: str = ""  # the likely cause, in words; "" if nothing is wrong
    command: str = ""  # the command that finds this again
    culprits: list[str] = field(default_factory=list)  # names of pairs and of rungs: the exact set
    rungs: list[Rung] = field(default_factory=list)
    pairs: list[ModulePair] = field(default_factory=list)
    matrix: Matrix = field(default_factory=Matrix)
    compared: str = ""  # how many modules and stages, in words
    not_compared: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # true, but no reason for another verdict
    case: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def same(self) -> bool:
        return self.word in (SAME, PRECISION)

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.word]

    def pair(self, name: str) -> ModulePair:
        return next(pair for pair in self.pairs if pair.name == name)

    def rung(self, name: str) -> Rung:
        return next(rung for rung in self.rungs if rung.name == name)

    def _repr_html_(self) -> str:
        """In a notebook: the sentence, the ladder, and the culprits among the modules."""
        rows = [(one.name, one.status, one.note) for one in (*self.rungs, *(p for p in self.pairs if p.culprit))]
        return table(f"{self.word}: {self.sentence}", rows, ("where", "verdict", "note"))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: infinities, which JSON does not have, become the strings "inf" and "nan"."""
        return {**plain(asdict(self)), "exit_status": self.exit_status}


def plain(value: Any) -> Any:
    """`value` with nothing in it that JSON cannot say."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
