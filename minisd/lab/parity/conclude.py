"""Findings -> the verdict, in words."""

from collections import Counter
from collections.abc import Sequence

from minisd.lab.parity.verdict import DIFFERENT, PRECISION, ROUNDED, SAME, UNKNOWN, ModulePair, Rung, Verdict


def conclude(a: str, b: str, rungs: list[Rung], pairs: list[ModulePair]) -> Verdict:
    """The rule: any culprit makes two functions; another dtype anywhere, another precision; else they are the same."""
    word, sentence, cause = worded(rungs, pairs)
    verdict = Verdict(word, sentence, a, b, cause, rungs=rungs, pairs=pairs, compared=compared(rungs, pairs))
    if word == DIFFERENT:
        verdict.culprits = culprits_in(rungs, pairs)
    return verdict


def worded(rungs: list[Rung], pairs: list[ModulePair]) -> tuple[str, str, str]:
    """The verdict's word, its sentence and the likely cause."""
    if culprits_in(rungs, pairs):
        return DIFFERENT, different(rungs, pairs), likely_cause(rungs, pairs)
    if any(pair.status == UNKNOWN for pair in pairs):
        why = first_unknown(pairs)
        return UNKNOWN, f"cannot tell: {why}", why
    other = [pair for pair in pairs if is_other_precision(pair)]
    if other or any(rung.status == PRECISION for rung in rungs):
        cause = precision(rungs, pairs, other)
        sentence = f"A and B are the same function in another precision: {cause}; {margins(rungs, pairs)}"
        return PRECISION, sentence, cause
    if not any(pair.calls for pair in pairs) and not any(rung.relative64 is not None for rung in rungs):
        return UNKNOWN, "cannot tell: nothing was compared in float64", ""
    return SAME, f"A and B are the same function: {margins(rungs, pairs)}", ""


def culprits_in(rungs: Sequence[Rung], pairs: Sequence[ModulePair]) -> list[str]:
    return [item.name for item in (*pairs, *rungs) if item.culprit]


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def compared(rungs: Sequence[Rung], pairs: Sequence[ModulePair]) -> str:
    """What was compared, counted."""
    called = [pair for pair in pairs if pair.calls]
    told = [f"{count(len(called), 'module')} in {count(sum(pair.calls for pair in called), 'call')}"] if called else []
    if called and len(called) <= 8:
        told[0] += f" ({', '.join(pair.name for pair in called)})"
    return " and ".join([*told, f"{count(len(rungs), 'rung')} of the ladder"] if rungs else told)


def margins(rungs: Sequence[Rung], pairs: Sequence[ModulePair]) -> str:
    """How far apart, at most."""
    widest = max((item.relative64 for item in (*rungs, *pairs) if item.relative64 is not None), default=0.0)
    r64 = max((rung.r64 for rung in rungs if rung.r64 is not None and rung.r64 == rung.r64), default=None)
    told = f"in float64 no part differs by more than {widest:.1e}"
    if r64 is None:
        return told
    return f"{told}; what is left in working precision is rounding, at most {r64:.1f} times A's own"


# ---- cannot tell -----------------------------------------------------------------------------------------


def first_unknown(pairs: Sequence[ModulePair]) -> str:
    """A is no reference: the note of the innermost pair that shows it."""
    unclear = [pair for pair in pairs if pair.status == UNKNOWN]
    around = {pair.parent for pair in unclear}
    return next(pair for pair in unclear if pair.name not in around).note


# ---- another precision -----------------------------------------------------------------------------------


def computing(pair: ModulePair) -> list[tuple[str, str]]:
    """The dtypes that a pair computes in, (A's, B's), where they differ."""
    return [(one.a, one.b) for one in pair.attributes if one.what == "computes in"]


def rounded(pair: ModulePair) -> list[str]:
    """The dtypes that one side's weights are rounded to."""
    return [one.b.removeprefix(ROUNDED) for one in pair.attributes if one.b.startswith(ROUNDED)]


def is_other_precision(pair: ModulePair) -> bool:
    return bool(computing(pair) or rounded(pair)) or pair.status == PRECISION


def precision(rungs: Sequence[Rung], pairs: Sequence[ModulePair], other: list[ModulePair]) -> str:
    """Which modules have another precision, and in which of the ways: the first that applies."""
    for pair in other:
        pair.status = PRECISION
    calls = sum(pair.calls > 0 for pair in pairs)
    return (
        other_dtypes([pair for pair in other if computing(pair)], calls)
        or rounded_weights([pair for pair in other if rounded(pair)])
        or next((f"{pair.name}: {pair.note}" for pair in reversed(other) if pair.note), "")  # a constant: the innermost
        or next(f"{rung.name}: {rung.note}" for rung in rungs if rung.status == PRECISION)
    )


def other_dtypes(pairs: list[ModulePair], calls: int) -> str:
    """Modules that compute in another dtype; where it is nearly all of them, the dtypes alone."""
    if not pairs:
        return ""
    (one, two), most = Counter(both for pair in pairs for both in computing(pair)).most_common(1)[0]
    if most > 0.8 * calls:
        return f"A computes in {one}, B in {two}"
    one, two = computing(pairs[0])[0]
    return f"{pairs[0].name} computes in {one} in A and in {two} in B ({count(len(pairs), 'module')} in all)"


def rounded_weights(pairs: list[ModulePair]) -> str:
    if not pairs:
        return ""
    many = count(len(pairs), "module")
    return f"the weights of {many}, first {pairs[0].name}, are rounded to {rounded(pairs[0])[0]} on one side"


# ---- different functions ---------------------------------------------------------------------------------


def different(rungs: Sequence[Rung], pairs: Sequence[ModulePair]) -> str:
    """The first rung that shows it, and the culprits."""
    culprits = culprits_in(rungs, pairs)
    first = next((rung for rung in rungs if rung.status == DIFFERENT), None)
    stage = next((pair.stage for pair in pairs if pair.culprit and pair.status == DIFFERENT and pair.stage), "")
    seen = first.name if first else stage
    shown = f", first seen at {seen!r}" if seen else ", in what the case does not reach"
    names = ", ".join(culprits[:4]) + (f" and {len(culprits) - 4} more" if len(culprits) > 4 else "")
    return f"A and B are different functions{shown}; {count(len(culprits), 'culprit')}: {names}"


def likely_cause(rungs: Sequence[Rung], pairs: Sequence[ModulePair]) -> str:
    """What the first culprit does not have in common with its counterpart."""
    guilty = [pair for pair in pairs if pair.culprit]
    between = [rung for rung in rungs if rung.culprit and rung.kind != "network"]
    if between:
        return f"{between[0].name}: {between[0].note or 'its code'}"
    if not guilty:
        return ""
    first = guilty[0]
    told = [str(one) for one in first.attributes]
    alike = [pair for pair in guilty if [str(one) for one in pair.attributes] == told and told]
    where = f"{first.name} and {len(alike) - 1} more" if len(alike) > 1 else first.name
    return f"{where}: " + "; ".join([*told, first.note] if first.note else told or ["its code"])
