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
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minisd.lab.parity import attributes
from minisd.lab.parity.pairing import Twins
from minisd.lab.parity.promote import as_written, float64
from minisd.lab.parity.resemblance import describe
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, ROUNDED, SAME, UNKNOWN, Attribute, ModulePair, limit

EPS32 = 2.0**-23
WEIGHTS = ("weight", "bias", "in_proj_weight", "in_proj_bias")
KEPT = 1 << 16  # elements of a tensor that B passes to a module and A does not, such as a mask

# What code that was written for other inputs may end with.
FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    OSError,
)

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


def copied(value: Any) -> Any:
    """`value` with tensors of its own: code that writes into its arguments must not write into somebody else's.

    A tensor that is there twice is one tensor in the copy too.
    """
    copies = {id(tensor): tensor.clone() for tensor in tensors_in(value)}
    return map_tensors(lambda tensor: copies[id(tensor)], value)


def first_tensor(output: Any) -> Tensor:
    """What a module says: a tensor, or the first one of a tuple or of a record. Raises ValueError if there is none."""
    if isinstance(output, Tensor):
        return output
    items = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    for item in items:
        if isinstance(item, Tensor):
            return item
    raise ValueError(f"the output is a {type(output).__name__} without a tensor")


def outputs_of(output: Any, path: str = "") -> dict[str, Tensor]:
    """Where in an output -> the tensor there. Raises ValueError, at the top, if there is none or all are empty."""
    if isinstance(output, Tensor):
        return {path: as_numbers(output)}
    items: Any = ()
    if isinstance(output, Mapping):
        items = output.items()
    elif isinstance(output, tuple | list):
        items = enumerate(output)
    elif is_dataclass(output):
        items = vars(output).items()
    found = {place: tensor for key, item in items for place, tensor in outputs_of(item, f"{path}[{key!r}]").items()}
    if not path and not found:
        raise ValueError(f"the output is a {type(output).__name__} without a tensor")
    return found


def as_numbers(tensor: Tensor) -> Tensor:
    """Sparse, complex and boolean tensors as dense, real and whole ones."""
    if tensor.dtype == torch.bool:
        return tensor.to(torch.int8)
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return torch.view_as_real(dense) if dense.is_complex() else dense


def same_places(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Which tensor of B's output belongs to which of A's: by key, else in order; if they are not as many, the first."""
    if a.keys() == b.keys():
        return [(place, place) for place in a]
    return list(zip(a, b, strict=True)) if len(a) == len(b) else [(next(iter(a)), next(iter(b)))]


def unlike(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """How the form of B's output is not A's, or ""."""
    if len(a) != len(b):
        return f"it returns {len(b)} tensors instead of {len(a)}"
    for place, other in same_places(a, b):
        if a[place].shape != b[other].shape:
            where = f" of {place}" if place else ""
            return f"its shape{where} is {tuple(b[other].shape)} instead of {tuple(a[place].shape)}"
    return ""


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
                own = tensor.clone() if small else None
                slots[id(tensor)] = Slot(tensor.shape, tensor.is_floating_point(), own)
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

    @classmethod
    def between(cls, twins: list[Twins], pairs: Mapping[str, ModulePair]) -> "Loan":
        """What twins have to lend each other; a weight that several modules share once."""
        loans = [one for twin in twins for one in lent(twin, pairs[twin.name].attributes)]
        return cls(list({id(parameter): (parameter, value) for parameter, value in loans}.values()))

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


def lent(twin: Twins, found: list[Attribute]) -> list[tuple[nn.Parameter, Tensor]]:
    """The finer of two weights of which one is the other rounded, for the module that has the coarser."""
    loans = []
    for attribute in found:
        if attribute.b.startswith(ROUNDED):
            one, other = getattr(twin.a, attribute.what), getattr(twin.b, attribute.what)
            coarse = attribute.b.removeprefix(ROUNDED)
            b_is_coarse = torch.equal(one.data.to(getattr(torch, coarse)).double(), other.data.double())
            finer, poorer = (one, other) if b_is_coarse else (other, one)
            loans.append((poorer, finer.data.reshape(poorer.shape)))
    return loans


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
    exact: bool = False  # two modules of one interface: the number and the shapes of what the whole returns count
    alone: bool = False  # B is a part without a whole around it: it is called with A's tensors, in order
    loan: "Loan" = field(default_factory=lambda: Loan([]))
    cells: dict[tuple[str, str], Measure] = field(default_factory=dict)  # (stage, name) -> its worst call there
    worst: dict[str, tuple[bool, float]] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)  # stages where A is no reference
    constants: set[tuple[str, str]] = field(default_factory=set)  # (stage, name) where a rounded constant explains it
    busy: bool = False
    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    answered: Counter[str] = field(default_factory=Counter)  # how many of B's calls, in this stage, have been used
    before: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))  # what A's modules were given
    given: dict[str, list[tuple[str, list[Tensor]]]] = field(default_factory=lambda: defaultdict(list))

    def replay(self, stage: str, run_a: Callable[[], Any], run_b: Callable[[], Any]) -> tuple[Any, Any]:
        """Compare all twins in one stage, and return what both components said as a whole.

        `run_a`, `run_b`: run the whole component on the stage's input.
        """
        for notes in (self.calls, self.answered, self.given, self.before):
            notes.clear()
        with torch.no_grad(), self.buffers_kept(), float64(), self.loan.taken():
            with self.buffers_kept():
                said_b = self.listen_to_b(run_b)
            with ExitStack() as stack:
                for twin in self.twins:
                    first = twin.a.register_forward_pre_hook(self.takes_down(twin), with_kwargs=True, prepend=True)
                    stack.callback(first.remove)
                    hook = twin.a.register_forward_hook(self.waits_for(stage, twin), with_kwargs=True)
                    stack.callback(hook.remove)
                return run_a(), said_b

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """Buffers that a run changes, such as the statistics of a BatchNorm, are put back."""
        wholes = [module for twin in self.twins if not twin.parent for module in (twin.a, twin.b)]
        owners = [module for whole in wholes for module in whole.modules()]
        kept = [(owner, name, b, b.clone()) for owner in owners for name, b in owner._buffers.items() if b is not None]
        try:
            yield
        finally:
            for owner, name, buffer, value in kept:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                owner._buffers[name] = buffer

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
                stack.callback(twin.b.register_forward_pre_hook(note(twin.name), with_kwargs=True, prepend=True).remove)
            try:
                return run_b()
            except FAILURES as error:
                return error

    def takes_down(self, twin: Twins) -> Callable[..., None]:
        """The hook before A's module: what it is given, before it can write into it."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not self.busy:
                self.before[twin.name].append(copied((tuple(args), dict(kwargs))))

        return hook

    def waits_for(self, stage: str, twin: Twins) -> Callable[..., None]:
        """The hook on A's module: it does not end before its twin has answered too."""

        def hook(_: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if self.busy:
                return
            args, kwargs = self.before[twin.name].pop()
            self.busy = True
            try:
                self.compare(stage, twin, args, kwargs, output)
            finally:
                self.busy = False
            self.given[twin.parent].append((twin.name, tensors_in((args, kwargs))))
            self.given.pop(twin.name, None)

        return hook

    def compare(self, stage: str, twin: Twins, args: Any, kwargs: Any, output: Any) -> None:
        """One call of A's module, with `args` as they were before it, and the answer of its twin."""
        pair = self.pairs[twin.name]
        try:
            b_args, b_kwargs = self.arguments(twin, args, kwargs)
            all_a64 = outputs_of(output)
            if not sum(tensor.numel() for tensor in all_a64.values()):
                raise ValueError("the output is empty")
        except ValueError as error:
            pair.note = pair.note or f"could not be compared: {error}"
            return
        if not all(bool(tensor.isfinite().all()) for tensor in all_a64.values()):
            self.leave_open(stage, pair, f"A is not finite from {pair.name} on")
            return
        try:
            all_b64, all_a, all_b = self.other_answers(twin, (args, kwargs), (b_args, b_kwargs))
            places = same_places(all_a64, all_b64)
            answers = [(all_a64[one], all_b64[two], all_a[one], all_b[two]) for one, two in places]
        except FAILURES as error:
            self.remember(stage, pair, FAILED)
            pair.note = f"fails where A does not: {one_line(error)}"
            return
        if self.exact and not twin.parent and unlike(all_a64, all_b64):
            self.remember(stage, pair, FAILED)
            pair.note = unlike(all_a64, all_b64)
            return
        found, answer = max(((measure(*one), one) for one in answers), key=lambda both: severity(both[0]))
        if found.deviates and not self.repeats(twin, args, kwargs, all_a64):
            self.leave_open(stage, pair, f"A does not repeat itself at {pair.name}")
            return
        self.put_down(stage, twin, found, answer, (b_args, b_kwargs))

    def other_answers(self, twin: Twins, a_given: Any, b_given: Any) -> tuple[dict[str, Tensor], ...]:
        """B in float64, A and B in their own precisions, each on copies of what it is given."""
        in_float64 = copied(b_given)
        b64 = outputs_of(twin.b(*in_float64[0], **in_float64[1]))
        with as_written(), self.loan.returned():
            args, kwargs = in_dtype(a_given, self.working[0])
            a = outputs_of(twin.a(*args, **kwargs))
            args, kwargs = in_dtype(b_given, self.working[1])
            return b64, a, outputs_of(twin.b(*args, **kwargs))

    def put_down(self, stage: str, twin: Twins, found: Measure, answer: tuple[Tensor, ...], b_given: Any) -> None:
        """What one call has shown: A64, B64, A and B, and how far they are apart."""
        pair, (a64, b64, a, b) = self.pairs[twin.name], answer
        if self.observe is not None and a64.is_floating_point():
            self.observe(twin.name, stage, a64, a, b, b64)
        constant = found.deviates and not differs_at_rest(twin, pair) and is_rounding(found, a, b)
        if self.remember(stage, pair, found, constant) and found.deviates:
            pair.note = ROUNDED_CONSTANT if constant else self.say(twin, a64, b64, *b_given)

    def leave_open(self, stage: str, pair: ModulePair, why: str) -> None:
        """A gives nothing that B could be held against."""
        pair.calls += 1
        self.open.add(stage)
        if pair.status != DIFFERENT:
            pair.status, pair.note = UNKNOWN, why

    def repeats(self, twin: Twins, args: Any, kwargs: Any, said: dict[str, Tensor]) -> bool:
        """Does A say the same once more?"""
        with self.buffers_kept():
            again = outputs_of(twin.a(*copied(args), **copied(kwargs)))
        return all(place in again and not apart(tensor, again[place]).deviates for place, tensor in said.items())

    def status_of(self, stage: str, found: Measure) -> str:
        """What a network's rung is, seeing what its parts are."""
        if stage in self.open:
            return UNKNOWN
        if not found.deviates:
            return SAME
        cells = [self.cells[where, name] for where, name in self.constants if where == stage]
        widest = max((cell.relative64 for cell in cells), default=0.0)
        return PRECISION if cells and found.relative64 <= 2 * widest else DIFFERENT

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

    def remember(self, stage: str, pair: ModulePair, found: Measure, constant: bool = False) -> bool:
        """Put a measurement where it belongs; is it the worst of its pair so far?

        `constant`: the difference is that of a rounded constant.
        """
        pair.calls += 1
        cell = self.cells.get((stage, pair.name))
        if cell is None or found.relative64 > cell.relative64:
            self.cells[stage, pair.name] = found
        if constant:
            self.constants.add((stage, pair.name))
        if found.deviates and pair.status != DIFFERENT:
            pair.status = PRECISION if constant else DIFFERENT
        worst = pair.relative64 is None or severity(found) > self.worst[pair.name]
        if worst:
            self.worst[pair.name] = severity(found)
            pair.relative64, pair.limit, pair.absmax = found.relative64, found.limit, found.absmax
            pair.floor, pair.error, pair.r64, pair.stage = found.floor, found.error, found.r64, stage
        return worst

    def add_dtypes(self, roots: tuple[nn.Module, nn.Module], runs: tuple[Callable[[], Any], Callable[[], Any]]) -> None:
        """What twins compute in, from one run of each side in its own precision."""
        try:
            with torch.no_grad(), self.buffers_kept():
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
        for twin in self.twins:
            pair = self.pairs[twin.name]
            if pair.status == DIFFERENT or not has_other_weights(pair):
                continue
            if alike_in_form(twin):
                pair.status, pair.note = DIFFERENT, "the case does not reach the difference"
            else:
                pair.note = pair.note or "its weights have another form"
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
                received.setdefault(name, tensors_in(copied((args, kwargs))))

            return hook

        with ExitStack() as stack:
            for child in self.twins:
                if child.parent == twin.name:
                    stack.callback(child.b.register_forward_pre_hook(note(child.name), with_kwargs=True).remove)
            twin.b(*copied(args), **copied(kwargs))
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


def alike_in_form(twin: Twins) -> bool:
    """One class, and weights of the same shapes: then equal functions have equal weights."""
    shapes = [{name: p.shape for name, p in m.named_parameters(recurse=False)} for m in (twin.a, twin.b)]
    return type(twin.a) is type(twin.b) and shapes[0] == shapes[1]


ROUNDED_CONSTANT = "a constant is rounded to float32 on one side"


def differs_at_rest(twin: Twins, pair: ModulePair) -> bool:
    """Is there anything to be seen without running them that is not rounding, nor weights of another form?"""
    form = () if alike_in_form(twin) else WEIGHTS
    return any(ROUNDED not in one.b and one.what not in form for one in pair.attributes)


def is_rounding(found: Measure, a: Tensor, b: Tensor) -> bool:
    """Is a difference in float64 within A's own rounding, and gone without a trace in working precision?"""
    return torch.equal(a, b) and found.relative64 <= max(EPS32, 2 * found.floor)


def one_line(error: BaseException) -> str:
    """What went wrong, without what follows in further lines."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def severity(found: Measure) -> tuple[bool, float]:
    """Deviations before rounding, each by its size."""
    return (True, found.relative64) if found.deviates else (False, found.r64)


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A copy of `value` with its floating-point tensors in the dtype that a side works in."""
    return map_tensors(lambda t: t.to(dtype, copy=True) if t.is_floating_point() else t.clone(), value)
