"""The judge: what both sides computed at one place -> how far apart they are, and what that means.

Everything that is compared comes here as an `Observation`: modules that were replayed, results between the networks,
tensors of a trace. The rule is that of `verdict.py`. In: observations, one at a time; only numbers are kept. Out:
`Rung`s and `ModulePair`s with their measures, and which of them are the culprits. Next: `conclude.py`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minisd.lab.parity.resemblance import describe
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, ROUNDED, SAME, UNKNOWN, Finding, ModulePair, Rung, limit

EPS32 = 2.0**-23
LOOK = 16.0  # R64 that is worth a look: a correct implementation that adds in another order has 1 to 5
WEIGHTS = ("weight", "bias", "in_proj_weight", "in_proj_bias")
ROUNDED_CONSTANT = "a constant is rounded to float32 on one side"

# Called as observe(name, stage, A64, A, B, B64) for every comparison: what heat maps and histograms are made from.
Observer = Callable[[str, str, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Observation:
    """What the two sides computed from the same input. `a64` is the truth: the reference in float64."""

    name: str
    a64: Tensor
    a: Tensor | None  # the reference in its working precision; None where no working precision is involved
    b64: Tensor | None  # the candidate in float64; None where it has none, as in a trace in float32
    b: Tensor | None  # the candidate in its working precision
    stage: str = ""

    @property
    def best(self) -> Tensor:
        """The candidate in the best precision that there is."""
        best = self.b if self.b64 is None else self.b64
        assert best is not None
        return best

    def described(self) -> str:
        """How the candidate's tensor is wrong, in words."""
        best = self.best
        return describe(self.a64, best.double()) if self.a64.numel() == best.numel() else "another shape"


@dataclass(frozen=True)
class Measure:
    """One comparison; everything is relative to the largest value of `a64`, except `absmax`."""

    relative64: float
    limit: float
    absmax: float
    floor: float | None = None
    error: float | None = None
    proof: bool = True  # was the candidate computed in float64?

    @property
    def deviates(self) -> bool:
        return not self.relative64 <= self.limit

    @property
    def r64(self) -> float | None:
        return None if self.error is None or self.floor is None else self.error / self.floor if self.floor else 0.0

    @property
    def status(self) -> str:
        """DIFFERENT or SAME; without float64 UNKNOWN (worth a look), or SAME, which then proves nothing."""
        if self.proof:
            return DIFFERENT if self.deviates else SAME
        return SAME if self.r64 is not None and self.r64 <= LOOK else UNKNOWN

    @property
    def severity(self) -> tuple[bool, float]:
        """For sorting: deviations before rounding, each by its size."""
        return (True, self.relative64) if self.deviates else (False, self.r64 or 0.0)

    def write(self, finding: Finding) -> None:
        """Copy the numbers into a finding."""
        finding.relative64 = self.relative64 if self.proof else None
        finding.limit, finding.absmax = self.limit, self.absmax
        finding.floor, finding.error, finding.r64 = self.floor, self.error, self.r64


FAILED = Measure(float("inf"), limit(EPS32, EPS32), float("inf"), EPS32, float("inf"))


def distance(a: Tensor, b: Tensor) -> float:
    """The largest |a - b|; infinite where the shapes differ or one is not finite where the other is."""
    if a.numel() != b.numel():
        return float("inf")
    b = b.reshape(a.shape).to(a.device)
    if torch.equal(a, b):
        return 0.0
    gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a.double() - b.double()).abs())
    return float(gap.nan_to_num(nan=float("inf")).max()) if gap.numel() else 0.0


def largest(tensor: Tensor) -> float:
    """The largest finite magnitude, or 1 where there is none: what differences are relative to."""
    finite = tensor[tensor.isfinite()]
    return (float(finite.abs().max()) if finite.numel() else 0.0) or 1.0


def measure(seen: Observation) -> Measure:
    """How far apart both sides are. Where nothing was rounded before, float32's own limit holds."""
    size, absmax = largest(seen.a64), distance(seen.a64, seen.best)
    if seen.a is None:
        return Measure(absmax / size, limit(EPS32, EPS32), absmax)
    eps = torch.finfo(seen.a.dtype).eps if seen.a.is_floating_point() else EPS32
    floor = max(distance(seen.a64, seen.a) / size, eps / 2)
    error = None if seen.b is None else distance(seen.a64, seen.b) / size
    return Measure(absmax / size, limit(floor, eps), absmax, floor, error, proof=seen.b64 is not None)


def apart(a64: Tensor, b64: Tensor) -> Measure:
    """Compare two tensors in float64 where nothing was rounded before."""
    return measure(Observation("", a64, None, b64, None))


# ---- rungs: results outside of modules -------------------------------------------------------------------


def exact(name: str, one: Tensor, other: Tensor) -> Rung:
    """Integers, or numbers that nobody computes: equal or not."""
    if one.shape != other.shape:
        note = f"{tuple(one.shape)} in A, {tuple(other.shape)} in B"
        return Rung(name, "exact", status=DIFFERENT, culprit=True, note=note)
    off = (one != other).flatten()
    count = int(off.sum())
    rung = Rung(name, "exact", absmax=float(count))
    if count:
        at = int(off.nonzero()[0])
        values = f"{one.flatten()[at].item()} in A, {other.flatten()[at].item()} in B"
        rung.status, rung.culprit, rung.note = DIFFERENT, True, f"{count:,} differ, the first: {values}"
    return rung


def rung_of(seen: Observation, kind: str = "glue") -> Rung:
    """One result between two networks, or of a network as a whole."""
    found = measure(seen)
    rung = Rung(seen.name, kind, status=found.status)
    found.write(rung)
    if rung.status != SAME:
        rung.note = seen.described()
    rung.culprit = rung.status == DIFFERENT and kind == "glue"
    return rung


def noise_levels(name: str, written: Sequence[Tensor], exactly: Sequence[Tensor]) -> Rung:
    """A table of noise levels, as both sides compute it in float64, and as both have it."""
    rung = rung_of(Observation(name, exactly[0], None, exactly[1], None))
    if rung.culprit:
        at = int((exactly[0] - exactly[1]).abs().flatten().argmax()) if exactly[0].shape == exactly[1].shape else 0
        rung.note = f"{float(exactly[0].flatten()[at]):.9g} in A, {float(exactly[1].flatten()[at]):.9g} in B"
    elif distance(written[0], written[1]) > 0:
        rung.status = PRECISION
        rung.note = f"rounded otherwise, by {distance(*written):.1e}: computed in another precision and then stored"
    return rung


# ---- modules, call after call ----------------------------------------------------------------------------


@dataclass
class Judge:
    """Judges the pairs of one component, stage after stage, and remembers the worst call of each."""

    pairs: dict[str, ModulePair]  # parents before their children
    alike: frozenset[str] = frozenset()  # pairs of one class with weights of the same shapes
    observe: Observer | None = None
    cells: dict[tuple[str, str], Measure] = field(default_factory=dict)  # (stage, name) -> its worst call there
    worst: dict[str, tuple[bool, float]] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)  # stages where A is no reference
    constants: set[tuple[str, str]] = field(default_factory=set)  # (stage, name) where a rounded constant explains it

    def see(self, seen: Observation, found: Measure, explain: Callable[[], str]) -> None:
        """One call of a module. `explain` is asked about a deviation, if it is the worst so far."""
        pair = self.pairs[seen.name]
        assert seen.a is not None and seen.b is not None and seen.b64 is not None
        if self.observe is not None and seen.a64.is_floating_point():
            self.observe(seen.name, seen.stage, seen.a64, seen.a, seen.b, seen.b64)
        constant = found.deviates and not self.differs_at_rest(pair) and is_rounding(found, seen.a, seen.b)
        if self.remember(seen.stage, pair, found, constant) and found.deviates:
            said = seen.described() if seen.a64.numel() == seen.b64.numel() else ""
            pair.note = ROUNDED_CONSTANT if constant else "; ".join(filter(None, [said, explain()]))

    def fail(self, stage: str, name: str, why: str) -> None:
        """B fails, or returns something of another form, where A does not."""
        self.remember(stage, self.pairs[name], FAILED)
        self.pairs[name].note = why

    def leave_open(self, stage: str, name: str, why: str) -> None:
        """A gives nothing that B could be compared with."""
        pair = self.pairs[name]
        pair.calls += 1
        self.open.add(stage)
        if pair.status != DIFFERENT:
            pair.status, pair.note = UNKNOWN, why

    def remember(self, stage: str, pair: ModulePair, found: Measure, constant: bool = False) -> bool:
        """Keep a measure; is it the worst of its pair so far? `constant`: it is explained by a rounded constant."""
        pair.calls += 1
        cell = self.cells.get((stage, pair.name))
        if cell is None or found.relative64 > cell.relative64:
            self.cells[stage, pair.name] = found
        if constant:
            self.constants.add((stage, pair.name))
        if found.deviates and pair.status != DIFFERENT:
            pair.status = PRECISION if constant else DIFFERENT
        worst = pair.relative64 is None or found.severity > self.worst[pair.name]
        if worst:
            self.worst[pair.name] = found.severity
            found.write(pair)
            pair.stage = stage
        return worst

    def status_of(self, stage: str, found: Measure) -> str:
        """The status of a network's rung, given those of its modules."""
        if stage in self.open:
            return UNKNOWN
        if not found.deviates:
            return SAME
        cells = [self.cells[where, name] for where, name in self.constants if where == stage]
        widest = max((cell.relative64 for cell in cells), default=0.0)
        return PRECISION if cells and found.relative64 <= 2 * widest else DIFFERENT

    def rung(self, stage: str, found: Measure | None, whole: str) -> Rung:
        """The rung of a network: its outputs in float64, and the rounding of the pair that is the whole of it."""
        rung, cell = Rung(stage, "network"), self.cells.get((stage, whole))
        if found is None and cell is None:
            rung.status, rung.note = UNKNOWN, self.pairs[whole].note
            return rung
        if cell is not None:
            cell.write(rung)
        best = found or cell
        assert best is not None
        rung.relative64, rung.limit, rung.absmax = best.relative64, best.limit, best.absmax
        rung.status = self.status_of(stage, best)
        return rung

    def differs_at_rest(self, pair: ModulePair) -> bool:
        """Do their attributes differ by more than rounding, or weights of another form?"""
        form = () if pair.name in self.alike else WEIGHTS
        return any(ROUNDED not in one.b and one.what not in form for one in pair.attributes)

    def mark_culprits(self) -> None:
        """Pairs that deviate although none inside them does; weights that the case does not reach count too."""
        for pair in self.pairs.values():
            if pair.status == DIFFERENT or not has_other_weights(pair):
                continue
            if pair.name in self.alike:
                pair.status, pair.note = DIFFERENT, "the case does not reach the difference"
            else:
                pair.note = pair.note or "its weights have another form"
        guilty_inside: set[str] = set()
        for pair in reversed(self.pairs.values()):  # children come after their parents
            pair.culprit = pair.status == DIFFERENT and pair.name not in guilty_inside
            if pair.status == DIFFERENT or (pair.name in guilty_inside and pair.relative64 is None):
                guilty_inside.add(pair.parent)


def has_other_weights(pair: ModulePair) -> bool:
    """Do its weights differ, and not by rounding?"""
    return any(one.what in WEIGHTS and ROUNDED not in one.b for one in pair.attributes)


def is_rounding(found: Measure, a: Tensor, b: Tensor) -> bool:
    """Is a difference in float64 within A's own rounding, and zero in working precision?"""
    return torch.equal(a, b) and found.relative64 <= max(EPS32, 2 * (found.floor or 0.0))


# ---- modules of a trace ----------------------------------------------------------------------------------

OUTPUT_ONLY = "checked in its stage: the trace has no inputs for it"


def mark_recorded(pairs: Sequence[ModulePair], rungs: Iterable[Rung]) -> list[ModulePair]:
    """Culprits among the modules of a trace, and all that are off.

    Modules that are off on their own inputs and have none inside that is; else the first that is off. Where something
    is different for certain, what is only worth a look is no culprit.
    """
    proved = any(item.status == DIFFERENT for item in (*rungs, *pairs))
    off = [pair for pair in pairs if pair.status == DIFFERENT or (pair.status != SAME and not proved)]
    surely = [pair for pair in off if not pair.note.startswith(OUTPUT_ONLY)] or off[:1]
    for pair in surely:
        inside = (one for one in surely if one.stage == pair.stage and one.name.startswith(f"{pair.name}."))
        pair.culprit = not any(inside)
    return off


# ---- rungs as causes of rungs ----------------------------------------------------------------------------

NETWORKS = {"text": "text_encoder", "UNet": "unet", "VAE": "vae"}  # by the first word of a rung
LOOP = ("tokens", "timesteps", "alphas", "final alpha", "guidance", "latents")


def mark_first_causes(rungs: Iterable[Rung], explained: set[str]) -> None:
    """Rungs are culprits where nothing that they are made from differs. `explained`: components with a culprit."""
    alphas = loop = False  # did they differ before?
    for rung in rungs:
        what = rung.name.split(",")[0]
        if rung.kind == "network" and rung.status == DIFFERENT:
            rung.culprit = NETWORKS[what.split()[0]] not in explained
        elif (what == "latents" and alphas) or (what in ("UNet latents", "UNet context") and loop):
            rung.culprit = False
        alphas |= rung.culprit and what in ("alphas", "final alpha")
        loop |= what in LOOP and rung.status == DIFFERENT
