"""Replay: every module of B is given the inputs that its counterpart in A received, in float64.

What comes out different then is different in that module, whatever came before it. In: twins, and a way to run each
network. Out: an `Observation` a call, for the judge. A runs once from end to end, and after each of its modules the
twin is called: only the tensors of that moment are in memory. Next: `judge.py`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minisd.lab.hooks import Listener
from minisd.lab.parity import attributes
from minisd.lab.parity.calls import (
    FAILURES,
    Call,
    copied,
    in_dtype,
    one_line,
    outputs_of,
    same_places,
    tensors_in,
    unlike,
)
from minisd.lab.parity.judge import Judge, Measure, Observation, Observer, apart, measure
from minisd.lab.parity.pairing import Function, Twins
from minisd.lab.parity.promote import as_written, float64
from minisd.lab.parity.resemblance import describe
from minisd.lab.parity.verdict import DIFFERENT, ROUNDED, Attribute, ModulePair, Rung
from minisd.lab.sources import source_of


@dataclass
class Replay:
    """Replays a component's twins, stage after stage."""

    roots: tuple[nn.Module, nn.Module]
    twins: list[Twins]
    observe: Observer | None = None
    exact: bool = False  # two modules of one interface: the number and the shapes of what the whole returns count
    alone: bool = False  # B is a part without a whole around it: it is called with A's tensors, in order
    judge: Judge = field(init=False)
    loan: "Loan" = field(init=False)
    working: tuple[torch.dtype, torch.dtype] = field(init=False)
    busy: bool = False
    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    answered: Counter[str] = field(default_factory=Counter)  # how many of B's calls, in this stage, have been used
    before: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))  # what A's modules were given
    given: dict[str, list[tuple[str, list[Tensor]]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        pairs = {twin.name: pair_of(twin) for twin in self.twins}
        self.judge = Judge(pairs, frozenset(twin.name for twin in self.twins if alike_in_form(twin)), self.observe)
        self.loan = Loan.between(self.twins, pairs)
        self.working = dtype_of(self.roots[0]), dtype_of(self.roots[1])

    def replay(self, stage: str, run_a: Callable[[], Any], run_b: Callable[[], Any]) -> tuple[Any, Any]:
        """Compare all twins in one stage, and return what both components returned as a whole.

        `run_a`, `run_b`: run the whole component on the stage's input. B's part is an exception if it raised one.
        """
        for notes in (self.calls, self.answered, self.given, self.before):
            notes.clear()
        with torch.no_grad(), self.buffers_kept(), float64(), self.loan.taken():
            with self.buffers_kept():
                returned_b = self.listen_to_b(run_b)
            with Listener() as listener:
                for twin in self.twins:
                    listener.before(twin.a, self.keeps_inputs(twin), first=True)
                    listener.after(twin.a, self.calls_twin(stage, twin))
                return run_a(), returned_b

    def rung(self, stage: str, runs: tuple[Callable[[], Any], Callable[[], Any]], wholes: Sequence[str]) -> Rung:
        """Replay a stage and judge the whole: by its outputs if they are given by name, else by its own pair."""
        returned_a, returned_b = self.replay(stage, *runs)
        if isinstance(returned_b, Exception):
            note = f"B fails: {one_line(returned_b)}"
            return Rung(stage, "network", status=DIFFERENT, relative64=float("inf"), note=note)
        found = None
        if isinstance(returned_a, dict) and wholes != ("(whole)",):
            outputs = [apart(returned_a[name], returned_b[name]) for name in returned_a]
            found = max(outputs, key=lambda one: one.relative64 / one.limit)
        else:
            outputs_of(returned_a)  # raises where there is no tensor in it
        whole = next((name for name in wholes if (stage, name) in self.judge.cells), wholes[0])
        return self.judge.rung(stage, found, whole)

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
        """Run B as a whole, and note how it calls its own modules: the form of the arguments, not their values."""

        def notes(name: str) -> Callable[[Any, Any], None]:
            return lambda args, kwargs: self.calls[name].append(Call.of(args, kwargs))

        with Listener() as listener:
            for twin in self.twins:
                listener.before(twin.b, notes(twin.name), first=True)
            try:
                return run_b()
            except FAILURES as error:
                return error

    def keeps_inputs(self, twin: Twins) -> Callable[[Any, Any], None]:
        """Before A's module: its inputs are copied before it can write into them."""

        def hear(args: Any, kwargs: Any) -> None:
            if not self.busy:
                self.before[twin.name].append(copied((tuple(args), dict(kwargs))))

        return hear

    def calls_twin(self, stage: str, twin: Twins) -> Callable[[Any, Any, Any], None]:
        """After A's module: its twin is called before A goes on."""

        def hear(_args: Any, _kwargs: Any, output: Any) -> None:
            if self.busy:
                return
            args, kwargs = self.before[twin.name].pop()
            self.busy = True
            try:
                self.compare(stage, twin, (args, kwargs), output)
            finally:
                self.busy = False
            self.given[twin.parent].append((twin.name, tensors_in((args, kwargs))))
            self.given.pop(twin.name, None)

        return hear

    def compare(self, stage: str, twin: Twins, given: tuple[Any, Any], output: Any) -> None:
        """One call of A's module, with its arguments as they were before it, and the answer of its twin."""
        pair = self.judge.pairs[twin.name]
        try:
            b_given = self.arguments(twin, *given)
            all_a64 = outputs_of(output)
            if not sum(tensor.numel() for tensor in all_a64.values()):
                raise ValueError("the output is empty")
        except ValueError as error:
            pair.note = pair.note or f"could not be compared: {error}"
            return
        if not all(bool(tensor.isfinite().all()) for tensor in all_a64.values()):
            self.judge.leave_open(stage, twin.name, f"A is not finite from {twin.name} on")
            return
        try:
            b64, a, b = self.other_answers(twin, given, b_given)
            seen = [
                Observation(twin.name, all_a64[one], a[one], b64[two], b[two], stage)
                for one, two in same_places(all_a64, b64)
            ]
        except FAILURES as error:
            self.judge.fail(stage, twin.name, f"fails where A does not: {one_line(error)}")
            return
        if self.exact and not twin.parent and unlike(all_a64, b64):
            self.judge.fail(stage, twin.name, unlike(all_a64, b64))
            return
        found, worst = worst_of(seen)
        if found.deviates and not self.repeats(twin, given, all_a64):
            self.judge.leave_open(stage, twin.name, f"A does not repeat itself at {twin.name}")
            return
        self.judge.see(worst, found, lambda: self.first_given_otherwise(twin, *b_given))

    def other_answers(self, twin: Twins, given: Any, b_given: Any) -> tuple[dict[str, Tensor], ...]:
        """B in float64, A and B in their own precisions, each on copies of what it is given."""
        args, kwargs = copied(b_given)
        b64 = outputs_of(twin.b(*args, **kwargs))
        with as_written(), self.loan.returned():
            args, kwargs = in_dtype(given, self.working[0])
            a = outputs_of(twin.a(*args, **kwargs))
            args, kwargs = in_dtype(b_given, self.working[1])
            return b64, a, outputs_of(twin.b(*args, **kwargs))

    def repeats(self, twin: Twins, given: tuple[Any, Any], before: dict[str, Tensor]) -> bool:
        """Does A return the same once more?"""
        args, kwargs = copied(given)
        with self.buffers_kept():
            again = outputs_of(twin.a(*args, **kwargs))
        return all(place in again and not apart(tensor, again[place]).deviates for place, tensor in before.items())

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

    def add_dtypes(self, run_a: Callable[[], Any], run_b: Callable[[], Any]) -> None:
        """The dtypes that twins compute in, from one run of each side in its own precision."""
        runs = zip(self.roots, (run_a, run_b), strict=True)
        try:
            with torch.no_grad(), self.buffers_kept():
                seen = [attributes.computing_dtypes(root, run) for root, run in runs]
        except FAILURES:  # one of them does not run on this: its rung has that as a note
            return
        for name, (one, other) in attributes.dtypes_of_twins(self.twins, (seen[0], seen[1])).items():
            pair = self.judge.pairs[name]
            pair.a_dtype, pair.b_dtype = one, other
            if one and other and one != other:
                pair.attributes.append(Attribute("computes in", one, other))

    def first_given_otherwise(self, twin: Twins, args: Any, kwargs: Any) -> str:
        """Call B's twin once more on A's inputs: which module inside it is the first to receive something else?"""
        inside = self.given.get(twin.name, [])
        received: dict[str, list[Tensor]] = {}

        def notes(name: str) -> Callable[[Any, Any], None]:
            def hear(args: Any, kwargs: Any) -> None:
                received.setdefault(name, tensors_in(copied((args, kwargs))))

            return hear

        if not inside:
            return ""
        with Listener() as listener:
            for child in self.twins:
                if child.parent == twin.name:
                    listener.before(child.b, notes(child.name))
            twin.b(*copied(args), **copied(kwargs))
        for name, tensors in inside:
            for right, wrong in zip(tensors, received.get(name, []), strict=False):
                if right.is_floating_point() and apart(right, wrong).deviates:
                    said = describe(right, wrong) if right.numel() == wrong.numel() else "another shape"
                    told = f"{name} is the first part inside to be given something else"
                    return f"{told} ({said})" if said else told
        return ""


def worst_of(seen: list[Observation]) -> tuple[Measure, Observation]:
    """Of several outputs of one call the one that is farthest off."""
    return max(((measure(one), one) for one in seen), key=lambda both: both[0].severity)


# ---- twins at rest ---------------------------------------------------------------------------------------


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's weights; float32 if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def pair_of(twin: Twins) -> ModulePair:
    """A pair, with what can be seen of twins before they run."""
    code = [module.function if isinstance(module, Function) else module for module in (twin.a, twin.b)]
    return ModulePair(
        twin.name,
        twin.a_path,
        twin.b_path,
        twin.parent,
        a_class=type(twin.a).__name__,
        b_class=type(twin.b).__name__,
        a_source=source_of(code[0]),
        b_source=source_of(code[1]),
        attributes=attributes.differences(twin),
    )


def alike_in_form(twin: Twins) -> bool:
    """One class, and weights of the same shapes: then equal functions have equal weights."""
    shapes = [{name: p.shape for name, p in m.named_parameters(recurse=False)} for m in (twin.a, twin.b)]
    return type(twin.a) is type(twin.b) and shapes[0] == shapes[1]


@dataclass
class Loan:
    """Weights that are one side's, rounded: in float64 both sides take the finer ones, as if nothing was rounded."""

    weights: list[tuple[nn.Parameter, Tensor]]

    @classmethod
    def between(cls, twins: list[Twins], pairs: Mapping[str, ModulePair]) -> "Loan":
        """What twins have to lend each other; a weight that several modules share once."""
        loans = [one for twin in twins for one in lent(twin, pairs[twin.name].attributes)]
        return cls(list({id(parameter): (parameter, value) for parameter, value in loans}.values()))

    def swap(self) -> None:
        for index, (parameter, value) in enumerate(self.weights):
            self.weights[index] = parameter, parameter.data
            parameter.data = value

    @contextmanager
    def taken(self) -> Iterator[None]:
        self.swap()
        try:
            yield
        finally:
            self.swap()

    returned = taken


def lent(twin: Twins, found: list[Attribute]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The finer of two weights of which one is the other rounded, for the module that has the coarser."""
    for attribute in found:
        if attribute.b.startswith(ROUNDED):
            one, other = getattr(twin.a, attribute.what), getattr(twin.b, attribute.what)
            coarse = getattr(torch, attribute.b.removeprefix(ROUNDED))
            b_is_coarse = torch.equal(one.data.to(coarse).double(), other.data.double())
            finer, poorer = (one, other) if b_is_coarse else (other, one)
            yield poorer, finer.data.reshape(poorer.shape)
