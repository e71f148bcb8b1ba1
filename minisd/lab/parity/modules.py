"""Two modules, or two functions, without a model around them: the comparison that a unit test wants.

    verdict = compare_modules(reference, candidate, [(x, time)])

In: anything that can be called with tensors. Out: a `Verdict`. The same twins, replay and rule as for whole models.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from minisd.lab.parity import attributes
from minisd.lab.parity.pairing import LISTS, Twins, nearest
from minisd.lab.parity.promote import widened
from minisd.lab.parity.shadow import Loan, Observer, Shadow, copied, first_tensor, in_dtype, one_line
from minisd.lab.parity.telling import conclude
from minisd.lab.parity.verdict import DIFFERENT, UNKNOWN, ModulePair, Rung, Verdict
from minisd.lab.source import source_of


class Function(nn.Module):
    """A function that looks like a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def compare_modules(
    a: Callable[..., Any],
    b: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    *,
    names: Mapping[str, str] | None = None,
    titles: tuple[str, str] = ("A", "B"),
    observe: Observer | None = None,
) -> Verdict:
    """Is `b` the same function as the reference `a` on all of `inputs` (positional arguments, one tuple a call)?

    `names`: path of a module in B -> its twin's path in A; without it, modules at the same path are twins. Inputs are
    given to each in float64 and in its own precision. Raises ValueError where there is no input, or no output.
    """
    if not inputs:
        raise ValueError("compare_modules needs at least one tuple of inputs")
    started = time.perf_counter()
    one, other = (thing if isinstance(thing, nn.Module) else Function(thing) for thing in (a, b))
    twins = twins_of(one, other, names)
    pairs = {twin.name: pair_of(twin) for twin in twins}
    dtypes = working(one), working(other)
    shadow = Shadow(twins, pairs, dtypes, observe, exact=True, loan=Loan.between(twins, pairs))
    rungs = [call(shadow, one, other, index, tuple(arguments)) for index, arguments in enumerate(inputs)]
    runs = [partial(module, *in_dtype(inputs[0], working(module))) for module in (one, other)]
    shadow.add_dtypes((one, other), (runs[0], runs[1]))
    shadow.mark_culprits()
    verdict = conclude(*titles, rungs, list(shadow.pairs.values()))
    verdict.not_compared = ["inputs other than those given", "gradients"]
    verdict.versions, verdict.seconds = {"torch": torch.__version__}, time.perf_counter() - started
    return verdict


def working(module: nn.Module) -> torch.dtype:
    """The dtype of a module's weights; float32 if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def twins_of(a: nn.Module, b: nn.Module, names: Mapping[str, str] | None) -> list[Twins]:
    """Twins by `names`, or by equal paths; the two themselves in any case. Raises ValueError for a path not there."""
    mine, theirs = dict(a.named_modules()), dict(b.named_modules())
    pairs = {mine_path: path for path, mine_path in names.items()} if names is not None else {p: p for p in mine}
    for where, paths, modules in (("A", pairs.keys(), mine), ("B", pairs.values(), theirs)):
        strange = [path for path in paths if path not in modules] if names is not None else []
        if strange:
            raise ValueError(f"names: {where} has no module {strange[0]!r}; it has {', '.join(list(modules)[1:6])} ...")
    found = [
        Twins(path or "(whole)", path, pairs[path], module, theirs[pairs[path]])
        for path, module in mine.items()
        if path in pairs and pairs[path] in theirs and path and not isinstance(module, LISTS)
    ]
    twins = [Twins("(whole)", "", "", a, b), *found]
    by_path = {twin.a_path: twin.name for twin in twins}
    for twin in found:
        twin.parent = nearest(twin.a_path, by_path)
    return twins


def pair_of(twin: Twins) -> ModulePair:
    """What can be said of twins before they run."""
    pair = ModulePair(twin.name, twin.a_path, twin.b_path, twin.parent)
    pair.a_class, pair.b_class = type(twin.a).__name__, type(twin.b).__name__
    pair.a_source, pair.b_source = (source_of(code_of(module)) for module in (twin.a, twin.b))
    pair.attributes = attributes.differences(twin)
    return pair


def code_of(module: nn.Module) -> Any:
    return module.function if isinstance(module, Function) else module


def call(shadow: Shadow, a: nn.Module, b: nn.Module, index: int, arguments: tuple[Any, ...]) -> Rung:
    """One call: a rung of its own."""
    rung = Rung(f"call {index}", "network")
    wide = widened(arguments)
    said_a, said_b = shadow.replay(rung.name, lambda: a(*copied(wide)), lambda: b(*copied(wide)))
    if isinstance(said_b, Exception):
        rung.status, rung.relative64, rung.note = DIFFERENT, float("inf"), f"B fails: {one_line(said_b)}"
        return rung
    found = shadow.cells.get((rung.name, "(whole)"))
    if found is None:
        first_tensor(said_a)
        rung.status, rung.note = UNKNOWN, shadow.pairs["(whole)"].note
        return rung
    rung.relative64, rung.limit, rung.absmax = found.relative64, found.limit, found.absmax
    rung.floor, rung.error, rung.r64 = found.floor, found.error, found.r64
    rung.status = shadow.status_of(rung.name, found)
    return rung
