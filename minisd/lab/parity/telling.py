"""Measurements -> a verdict in words, and the verdict -> lines for a terminal."""

from collections import Counter
from collections.abc import Iterator

from minisd.lab.parity.verdict import DIFFERENT, PRECISION, ROUNDED, SAME, UNKNOWN, ModulePair, Rung, Verdict


def conclude(a: str, b: str, rungs: list[Rung], pairs: list[ModulePair]) -> Verdict:
    """The rule: any culprit makes two functions; another dtype anywhere, another precision; else they are the same."""
    culprits = [pair.name for pair in pairs if pair.culprit] + [rung.name for rung in rungs if rung.culprit]
    if culprits:
        return different(a, b, rungs, pairs, culprits)
    if any(pair.status == UNKNOWN for pair in pairs):
        return cannot_tell(a, b, rungs, pairs)
    other = [pair for pair in pairs if is_other_precision(pair)]
    if other or any(rung.status == PRECISION for rung in rungs):
        return precision(a, b, rungs, pairs, other)
    if not any(pair.calls for pair in pairs) and not any(rung.relative64 is not None for rung in rungs):
        return Verdict(UNKNOWN, "cannot tell: nothing was compared in float64", a, b, rungs=rungs, pairs=pairs)
    return Verdict(SAME, f"A and B are the same function: {margins(rungs, pairs)}", a, b, rungs=rungs, pairs=pairs)


def cannot_tell(a: str, b: str, rungs: list[Rung], pairs: list[ModulePair]) -> Verdict:
    """A is no reference: the innermost place that shows it."""
    unclear = [pair for pair in pairs if pair.status == UNKNOWN]
    around = {pair.parent for pair in unclear}
    first = next(pair for pair in unclear if pair.name not in around)
    return Verdict(UNKNOWN, f"cannot tell: {first.note}", a, b, cause=first.note, rungs=rungs, pairs=pairs)


def margins(rungs: list[Rung], pairs: list[ModulePair]) -> str:
    """How far apart, at most."""
    measured: list[Rung | ModulePair] = [*rungs, *pairs]
    widest = max((item.relative64 for item in measured if item.relative64 is not None), default=0.0)
    r64 = max((rung.r64 for rung in rungs if rung.r64 is not None and rung.r64 == rung.r64), default=None)
    told = f"in float64 no part differs by more than {widest:.1e}"
    if r64 is None:
        return told
    return f"{told}; what is left in working precision is rounding, at most {r64:.1f} times A's own"


def is_other_precision(pair: ModulePair) -> bool:
    rounded = any(one.what == "computes in" or one.b.startswith(ROUNDED) for one in pair.attributes)
    return rounded or pair.status == PRECISION


def precision(a: str, b: str, rungs: list[Rung], pairs: list[ModulePair], other: list[ModulePair]) -> Verdict:
    """Which modules compute in another dtype; all of them is said in one word."""
    computing = [pair for pair in other if any(one.what == "computes in" for one in pair.attributes)]
    for pair in other:
        pair.status = PRECISION
    changed = Counter((one.a, one.b) for pair in computing for one in pair.attributes if one.what == "computes in")
    (one, two), most = changed.most_common(1)[0] if changed else (("", ""), 0)
    if most > 0.8 * sum(pair.calls > 0 for pair in pairs):
        cause = f"A computes in {one}, B in {two}"
    elif computing:
        first = computing[0]
        which = next(one for one in first.attributes if one.what == "computes in")
        cause = (
            f"{first.name} computes in {which.a} in A and in {which.b} in B ({count(len(computing), 'module')} in all)"
        )
    elif not other:
        rung = next(rung for rung in rungs if rung.status == PRECISION)
        cause = f"{rung.name}: {rung.note}"
    elif not any(one.b.startswith(ROUNDED) for pair in other for one in pair.attributes):
        inner = next(pair for pair in reversed(other) if pair.note)
        cause = f"{inner.name}: {inner.note}"
    else:
        other = [pair for pair in other if any(one.b.startswith(ROUNDED) for one in pair.attributes)]
        kind = next(one.b for one in other[0].attributes if one.b.startswith(ROUNDED)).removeprefix(ROUNDED)
        many = count(len(other), "module")
        cause = f"the weights of {many}, first {other[0].name}, are rounded to {kind} on one side"
    sentence = f"A and B are the same function in another precision: {cause}; {margins(rungs, pairs)}"
    return Verdict(PRECISION, sentence, a, b, cause=cause, rungs=rungs, pairs=pairs)


def different(a: str, b: str, rungs: list[Rung], pairs: list[ModulePair], culprits: list[str]) -> Verdict:
    """The first rung that shows it, and the culprits."""
    first = next((rung for rung in rungs if rung.status == DIFFERENT), None)
    stage = next((pair.stage for pair in pairs if pair.culprit and pair.status == DIFFERENT and pair.stage), "")
    seen = first.name if first else stage
    shown = f", first seen at {seen!r}" if seen else ", in what the case does not reach"
    names = ", ".join(culprits[:4]) + (f" and {len(culprits) - 4} more" if len(culprits) > 4 else "")
    sentence = f"A and B are different functions{shown}; {count(len(culprits), 'culprit')}: {names}"
    return Verdict(DIFFERENT, sentence, a, b, cause(rungs, pairs), culprits=culprits, rungs=rungs, pairs=pairs)


def cause(rungs: list[Rung], pairs: list[ModulePair]) -> str:
    """What most likely is wrong: what the first culprit does not have in common with its twin."""
    guilty = [pair for pair in pairs if pair.culprit]
    named: list[Rung | ModulePair] = [*[rung for rung in rungs if rung.culprit and rung.kind != "network"], *guilty]
    if not named:
        return ""
    first = named[0]
    told = [str(one) for one in first.attributes] if isinstance(first, ModulePair) else []
    alike = [pair for pair in guilty if [str(one) for one in pair.attributes] == told and told]
    where = f"{first.name} and {len(alike) - 1} more" if len(alike) > 1 else first.name
    return f"{where}: " + "; ".join([*told, first.note] if first.note else told or ["its code"])


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


# ---- a terminal ------------------------------------------------------------------------------------------


def lines(verdict: Verdict, *, every_pair: bool = False) -> Iterator[str]:
    """The verdict for a person."""
    yield verdict.sentence
    if verdict.cause and verdict.word == DIFFERENT:
        yield f"likely cause: {verdict.cause}"
    yield f"A {verdict.a}"
    yield f"B {verdict.b}"
    yield ""
    yield f"{'rung':<28} {'float64':>9} {'limit':>9} {'floor':>9} {'R64':>7}"
    for rung in verdict.rungs:
        mark = {SAME: "", PRECISION: " precision", UNKNOWN: " look"}.get(rung.status, " DIFFERENT")
        mark += " <- culprit" if rung.culprit else ""
        cells = f"{number(rung.relative64):>9} {number(rung.limit):>9} {number(rung.floor):>9} {ratio(rung.r64):>7}"
        yield f"{rung.name:<28} {cells}{mark}" + (f"  {rung.note}" if rung.note else "")
    shown = verdict.pairs if every_pair else [pair for pair in verdict.pairs if pair.culprit][:10]
    for pair in shown:
        yield ""
        yield from pair_lines(pair)
    yield ""
    yield f"not compared: {'; '.join(verdict.not_compared)}"
    yield from (f"note: {note}" for note in verdict.notes)


def pair_lines(pair: ModulePair) -> Iterator[str]:
    yield f"{pair.name}  float64 {number(pair.relative64)}, R64 {ratio(pair.r64)}, worst at {pair.stage or '-'}"
    yield f"  A {pair.a or '(root)'}  {pair.a_class}  {pair.a_source}"
    yield f"  B {pair.b or '(root)'}  {pair.b_class}  {pair.b_source}"
    for attribute in pair.attributes:
        yield f"  {attribute}"
    if pair.note:
        yield f"  {pair.note}"


def number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.1e}"
