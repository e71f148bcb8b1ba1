"""A verdict as lines for a terminal."""

from collections.abc import Iterator

from minisd.lab.parity.verdict import DIFFERENT, PRECISION, SAME, UNKNOWN, ModulePair, Rung, Verdict

MARKS = {SAME: "", PRECISION: " precision", UNKNOWN: " look", DIFFERENT: " DIFFERENT"}


def lines(verdict: Verdict, *, every_pair: bool = False) -> Iterator[str]:
    """The verdict, the ladder and the culprits, or all pairs of modules."""
    yield verdict.sentence
    if verdict.cause and verdict.word == DIFFERENT:
        yield f"likely cause: {verdict.cause}"
    yield f"A {verdict.a}"
    yield f"B {verdict.b}"
    if verdict.compared:
        yield f"compared: {verdict.compared}"
    if verdict.rungs:
        yield ""
        yield f"{'rung':<28} {'float64':>9} {'limit':>9} {'floor':>9} {'R64':>7}"
        yield from map(rung_line, verdict.rungs)
    for pair in verdict.pairs if every_pair else [pair for pair in verdict.pairs if pair.culprit][:10]:
        yield ""
        yield from pair_lines(pair)
    yield ""
    yield f"not compared: {'; '.join(verdict.not_compared)}"
    yield from (f"note: {note}" for note in verdict.notes)


def rung_line(rung: Rung) -> str:
    mark = MARKS[rung.status] + (" <- culprit" if rung.culprit else "")
    cells = f"{number(rung.relative64):>9} {number(rung.limit):>9} {number(rung.floor):>9} {ratio(rung.r64):>7}"
    return f"{rung.name:<28} {cells}{mark}" + (f"  {rung.note}" if rung.note else "")


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
