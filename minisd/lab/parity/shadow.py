"""Shadow replay: every module of B is given the inputs that its twin in A received, in float64.

What comes out different then is different in that module, whatever came before it. A module is a culprit if it deviates
although none of the twins inside it does: the exact place, or places, where two implementations part.

In: twins, and a way to run each network. Out: a `ModulePair` for each, with its worst call. A runs once from end to
end, and each of its modules, when it is done, waits for its twin: only the tensors of that moment are in memory. Next:
`ladder.py`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minisd.lab.parity import attributes
from minisd.lab.parity.pairing import Twins
from minisd.lab.parity.promote import as_written, float64
from minisd.lab.parity.resemblance import describe
from minisd.lab.parity.verdict import DIFFERENT, ROUNDED, Attribute, ModulePair, limit

EPS32 = 2.0**-23
WEIGHTS = ("weight", "bias", "in_proj_weight", "in_proj_bias")
KEPT = 1 << 16  # elements of a tensor that B passes to a module and A does not, such as a mask

# What code that was written for other inputs may end with.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)

# Called as observe(name, stage, A64, A, B, B64) for every comparison: what pictures and histograms are made from.
Observer = Callable[[str, str, Tensor, Tensor, Tensor, Tensor], None]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value` with every tensor in its tuples, lists and dicts replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(function, item) for item in value)
    if type(value) is dict:
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in `value`, each once, in order."""
    found: dict[int, Tensor] = {}
    map_tensors(lambda tensor: found.setdefault(id(tensor), tensor), value)
    return list(found.values())


def first_tensor(output: Any) -> Tensor:
    """What a module says: a tensor, or the first one of a tuple or of a record. Raises ValueError if there is none."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    for item in items:
        if isinstance(item, Tensor):
            return item
    raise ValueError(f"the output is a {type(output).__name__} without a tensor")


# ---- how B is called -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a tensor goes. `own` is B's, if it is small: a mask has no counterpart in a call of A."""

    shape: torch.Size
    floating: bool
    own: Tensor | None


@dataclass
class Call:
    """A module's arguments with slots in the place of tensors."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> "Call":
        slots: dict[int, Slot] = {}

        def slot(tensor: Tensor) -> Slot:
            if id(tensor) not in slots:
                small = not tensor.is_floating_point() or tensor.numel() <= KEPT
                slots[id(tensor)] = Slot(tensor.shape, tensor.is_floating_point(), tensor if small else None)
            return slots[id(tensor)]

        return cls(map_tensors(slot, tuple(args)), map_tensors(slot, dict(kwargs)))

    def slots(self) -> list[Slot]:
        found: dict[int, Slot] = {}
        map_slots(lambda slot: found.setdefault(id(slot), slot), (self.args, self.kwargs))
        return list(found.values())

    def filled(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """B's arguments with A's tensors in them. Raises ValueError where they cannot be matched."""
        chosen = match(self.slots(), tensors)
        return (
            map_slots(lambda slot: chosen[id(slot)], self.args),
            map_slots(lambda slot: chosen[id(slot)], self.kwargs),
        )


def map_slots(function: Callable[[Slot], Any], value: Any) -> Any:
    if isinstance(value, Slot):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_slots(function, item) for item in value)
    if type(value) is dict:
        return {key: map_slots(function, item) for key, item in value.items()}
    return value


def match(slots: list[Slot], tensors: list[Tensor]) -> dict[int, Tensor]:
    """Which tensor of A goes where: by shape, by size, but for the batch, by number of axes, each in order."""
    waiting, chosen = list(tensors), {}
    tests: tuple[Callable[[Slot, Tensor], bool], ...] = (
        lambda slot, tensor: tensor.shape == slot.shape,
        lambda slot, tensor: tensor.numel() == slot.shape.numel(),
        lambda slot, tensor: tensor.ndim > 1 and tensor.shape[1:] == slot.shape[1:],
        lambda slot, tensor: tensor.ndim == len(slot.shape) and slot.own is None,
    )
    for slot in slots:
        for test in tests:
            found = next((t for t in waiting if t.is_floating_point() == slot.floating and test(slot, t)), None)
            if found is not None:
                waiting = [tensor for tensor in waiting if tensor is not found]
                chosen[id(slot)] = found.reshape(slot.shape) if found.numel() == slot.shape.numel() else found
                break
        else:
            if slot.own is None:
                raise ValueError(f"B takes a tensor of shape {tuple(slot.shape)} here, and A has none like it")
            chosen[id(slot)] = slot.own
    return chosen


# ---- numbers ---------------------------------------------------------------------------------------------


@dataclass
class Measure:
    """One comparison; everything is relative to the largest value of `a64`, except `absmax`."""

    relative64: float
    limit: float
    absmax: float
    floor: float
    error: float

    @property
    def deviates(self) -> bool:
        return not self.relative64 <= self.limit

    @property
    def r64(self) -> float:
        return self.error / self.floor if self.floor else 0.0


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


def measure(a64: Tensor, b64: Tensor, a: Tensor, b: Tensor) -> Measure:
    """Compare two outputs in float64 (`a64`, `b64`) and in the precisions that both sides work in (`a`, `b`)."""
    finite = a64[a64.isfinite()]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    size = size or 1.0
    absmax = distance(a64, b64)
    eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 2.0**-23
    floor = max(distance(a64, a) / size, eps / 2)
    return Measure(absmax / size, limit(floor, eps), absmax, floor, distance(a64, b) / size)


@dataclass
class Loan:
    """Weights that are one side's rounded ones: in float64 both sides take the finer, as if nothing was rounded."""

    weights: list[tuple[nn.Parameter, Tensor]]

    def swap(self) -> None:
        self.weights = [(parameter, exchange(parameter, value)) for parameter, value in self.weights]

    @contextmanager
    def taken(self) -> Iterator[None]:
        self.swap()
        try:
            yield
        finally:
            self.swap()

    returned = taken


def exchange(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Give a parameter another value; returns the one that it had."""
    before, parameter.data = parameter.data, value
    return before


def apart(a64: Tensor, b64: Tensor) -> Measure:
    """Compare two tensors in float64 where nothing was rounded before: float32's own limit holds."""
    finite = a64[a64.isfinite()]
    size = (float(finite.abs().max()) if finite.numel() else 0.0) or 1.0
    absmax = distance(a64, b64)
    return Measure(absmax / size, limit(EPS32, EPS32), absmax, EPS32, absmax / size)


# ---- the replay ------------------------------------------------------------------------------------------


@dataclass
class Shadow:
    """Replays a component's twins, stage after stage, and remembers the worst of each."""

    twins: list[Twins]
    pairs: dict[str, ModulePair]
    working: tuple[torch.dtype, torch.dtype]
    observe: Observer | None = None
    alone: bool = False  # B is a part without a whole around it: it is called with A's tensors, in order
    loan: "Loan" = field(default_factory=lambda: Loan([]))
    cells: dict[tuple[str, str], Measure] = field(default_factory=dict)  # (stage, name) -> its worst call there
    worst: dict[str, tuple[bool, float]] = field(default_factory=dict)
    busy: bool = False
    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    answered: Counter[str] = field(default_factory=Counter)  # how many of B's calls, in this stage, have been used
    given: dict[str, list[tuple[str, list[Tensor]]]] = field(default_factory=lambda: defaultdict(list))

    def replay(self, stage: str, run_a: Callable[[], Any], run_b: Callable[[], Any]) -> tuple[Any, Any]:
        """Compare all twins in one stage, and return what both components said as a whole.

        `run_a`, `run_b`: run the whole component on the stage's input.
        """
        with torch.no_grad(), float64(), self.loan.taken():
            self.calls.clear()
            self.answered.clear()
            said_b = self.listen_to_b(run_b)
            self.given.clear()
            with ExitStack() as stack:
                for twin in self.twins:
                    hook = twin.a.register_forward_hook(self.waits_for(stage, twin), with_kwargs=True)
                    stack.callback(hook.remove)
                return run_a(), said_b

    def listen_to_b(self, run_b: Callable[[], Any]) -> Any:
        """Run B as a whole, and note how it calls its own modules: the form of the arguments, not their values.

        Returns what it says, or the exception that it ends with.
        """

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                self.calls[name].append(Call.of(args, kwargs))

            return hook

        with ExitStack() as stack:
            for twin in self.twins:
                stack.callback(twin.b.register_forward_pre_hook(note(twin.name), with_kwargs=True).remove)
            try:
                return run_b()
            except FAILURES as error:
                return error

    def waits_for(self, stage: str, twin: Twins) -> Callable[..., None]:
        """The hook on A's module: it does not end before its twin has answered too."""

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.busy:
                return
            self.busy = True
            try:
                self.compare(stage, twin, args, kwargs, output)
            finally:
                self.busy = False
            self.given[twin.parent].append((twin.name, tensors_in((args, kwargs))))
            self.given.pop(twin.name, None)

        return hook

    def compare(self, stage: str, twin: Twins, args: Any, kwargs: Any, output: Any) -> None:
        pair = self.pairs[twin.name]
        try:
            b_args, b_kwargs = self.arguments(twin, args, kwargs)
            a64 = first_tensor(output)
        except ValueError as error:
            pair.note = pair.note or f"could not be compared: {error}"
            return
        try:
            b64 = first_tensor(twin.b(*b_args, **b_kwargs))
            with as_written(), self.loan.returned():
                a = first_tensor(twin.a(*in_dtype(args, self.working[0]), **in_dtype(kwargs, self.working[0])))
                b = first_tensor(twin.b(*in_dtype(b_args, self.working[1]), **in_dtype(b_kwargs, self.working[1])))
        except FAILURES as error:
            self.remember(stage, pair, FAILED)
            pair.note = f"fails where A does not: {one_line(error)}"
            return
        found = measure(a64, b64, a, b)
        if self.observe is not None:
            self.observe(twin.name, stage, a64, a, b, b64)
        if self.remember(stage, pair, found) and found.deviates:
            pair.note = self.say(twin, a64, b64, b_args, b_kwargs)

    def arguments(self, twin: Twins, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A's inputs in the way that B is called. Copies of one code are called in the same way."""
        if type(twin.a) is type(twin.b):
            return args, kwargs
        calls = self.calls.get(twin.name)
        if not calls and self.alone:
            return tuple(tensors_in((args, kwargs))), {}
        if not calls:
            raise ValueError("B never calls it")
        self.answered[twin.name] += 1
        return calls[min(self.answered[twin.name], len(calls)) - 1].filled(tensors_in((args, kwargs)))

    def remember(self, stage: str, pair: ModulePair, found: Measure) -> bool:
        """Put a measurement where it belongs; is it the worst of its pair so far?"""
        pair.calls += 1
        cell = self.cells.get((stage, pair.name))
        if cell is None or found.relative64 > cell.relative64:
            self.cells[stage, pair.name] = found
        worst = pair.relative64 is None or severity(found) > self.worst[pair.name]
        if worst:
            self.worst[pair.name] = severity(found)
            pair.status = DIFFERENT if found.deviates else pair.status
            pair.relative64, pair.limit, pair.absmax = found.relative64, found.limit, found.absmax
            pair.floor, pair.error, pair.r64, pair.stage = found.floor, found.error, found.r64, stage
        return worst

    def add_dtypes(self, roots: tuple[nn.Module, nn.Module], runs: tuple[Callable[[], Any], Callable[[], Any]]) -> None:
        """What twins compute in, from one run of each side in its own precision."""
        try:
            seen = [attributes.computing_dtypes(root, run) for root, run in zip(roots, runs, strict=True)]
        except FAILURES:  # one of them does not run on this: a rung says so
            return
        for name, (one, other) in attributes.dtypes_of_twins(self.twins, (seen[0], seen[1])).items():
            pair = self.pairs[name]
            pair.a_dtype, pair.b_dtype = one, other
            if one and other and one != other:
                pair.attributes.append(Attribute("computes in", one, other))

    def mark_culprits(self) -> None:
        """Those that deviate although none of the twins inside them does; weights out of the case's reach count too."""
        for pair in self.pairs.values():
            if pair.status != DIFFERENT and has_other_weights(pair):
                pair.status, pair.note = DIFFERENT, "the case does not reach the difference"
        guilty_inside: set[str] = set()
        for pair in reversed(self.pairs.values()):  # children come after their parents
            pair.culprit = pair.status == DIFFERENT and pair.name not in guilty_inside
            if pair.status == DIFFERENT or (pair.name in guilty_inside and pair.relative64 is None):
                guilty_inside.add(pair.parent)

    def say(self, twin: Twins, a64: Tensor, b64: Tensor, args: Any, kwargs: Any) -> str:
        """How the output is wrong, and which part inside is the first to be given something else."""
        said = describe(a64, b64) if a64.numel() == b64.numel() else ""
        return "; ".join(filter(None, [said, self.first_given_otherwise(twin, args, kwargs)]))

    def first_given_otherwise(self, twin: Twins, args: Any, kwargs: Any) -> str:
        """B's twin once more, on A's inputs: what do the parts inside it receive?"""
        inside = self.given.get(twin.name, [])
        if not inside:
            return ""
        received: dict[str, list[Tensor]] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
                received.setdefault(name, tensors_in((args, kwargs)))

            return hook

        with ExitStack() as stack:
            for child in self.twins:
                if child.parent == twin.name:
                    stack.callback(child.b.register_forward_pre_hook(note(child.name), with_kwargs=True).remove)
            twin.b(*args, **kwargs)
        for name, tensors in inside:
            for right, wrong in zip(tensors, received.get(name, []), strict=False):
                if right.is_floating_point() and apart(right, wrong).deviates:
                    said = describe(right, wrong) if right.numel() == wrong.numel() else "another shape"
                    told = f"{name} is the first part inside to be given something else"
                    return f"{told} ({said})" if said else told
        return ""


def has_other_weights(pair: ModulePair) -> bool:
    """Do its weights differ, and not by rounding?"""
    return any(one.what in WEIGHTS and ROUNDED not in one.b for one in pair.attributes)


def one_line(error: BaseException) -> str:
    """What went wrong, without what follows in further lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def severity(found: Measure) -> tuple[bool, float]:
    """Deviations before rounding, each by its size."""
    return (True, found.relative64) if found.deviates else (False, found.r64)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating-point tensors in the dtype that a side works in."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, value)
