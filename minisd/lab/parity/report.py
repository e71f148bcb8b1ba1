"""A verdict as one HTML file: no request to any network, light and dark, usable by keyboard.

In: a `Verdict`, and what an `Evidence` saw. Out: text. The page itself is `report.html` beside this file; here are the
drawings (inline SVG, and images as data URLs) and the numbers as text.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from minisd.lab.page import as_data, environment
from minisd.lab.parity.evidence import Evidence, Sight
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, SAME, UNKNOWN, ModulePair, Rung, Verdict
from minisd.pipeline import to_pictures

LOWEST, HIGHEST = -17, 3  # powers of ten on the error chart
CHART = (760, 300)  # pixels
MARGIN = (52, 10, 10, 120)  # of the chart: left, top, right, bottom


def report(verdict: Verdict, evidence: Evidence) -> str:
    """The whole page."""
    page = environment()
    page.filters |= {"number": number, "slug": slug, "word": word, "shade": shade}
    text = page.get_template("lab/parity/report.html").render(
        verdict=verdict,
        tone=tone(verdict.word),
        narrow=any(is_narrow(rung) for rung in verdict.rungs),
        growth=growth(verdict),
        pairs=[page_of(pair, evidence.sights.get(pair.name)) for pair in verdict.pairs],
        matrix=matrix(verdict),
        pictures=pictures(evidence.pictures) if evidence.pictures else None,
    )
    return re.sub("</t[dhr]>", "", text)  # HTML does without the ends of cells and rows, of which there are 15,000


def tone(status: str) -> str:
    """A status as the name of a colour in the page's style."""
    return {SAME: "same", PRECISION: "precision", DIFFERENT: "different"}.get(status, "unknown")


def is_narrow(item: Rung | ModulePair) -> bool:
    """Whether only R64 was measured: without float64 nothing can be proved the same."""
    return item.relative64 is None and item.r64 is not None


def word(item: Rung | ModulePair) -> str:
    """What was found of a rung, or of a pair."""
    if item.status == UNKNOWN:
        return "look"
    return "within rounding" if item.status == SAME and is_narrow(item) else item.status


def shade(item: Rung | ModulePair) -> str:
    """`tone` for one finding: neither green nor red where only R64 was measured."""
    found = word(item)
    return {"look": "look", "within rounding": "unknown"}.get(found) or tone(item.status)


def number(value: float | None) -> str:
    """1.2e-07; a dash for what was not measured."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    return f"{value:.1f}" if 0.1 <= abs(value) < 10_000 else f"{value:.1e}"


def slug(name: str) -> str:
    """A name as an anchor."""
    return "pair-" + "".join(letter if letter.isalnum() else "-" for letter in name)


# ---- one pair --------------------------------------------------------------------------------------------


def page_of(pair: ModulePair, sight: Sight | None) -> dict[str, Any]:
    """All that the page shows of a pair."""
    return {
        "pair": pair,
        "depth": pair.name.count("."),
        "tone": "culprit" if pair.culprit else shade(pair),
        "heat": heat_colour(pair.r64),
        "sight": sight,
        "bars": bars(sight.histogram) if sight and sight.histogram else None,
        "map": heat_map(sight.heat) if sight and sight.distance > 0 else "",
    }


def heat_colour(r64: float | None) -> str:
    """From calm (R64 of 1: rounding like A's own) to alarming (1,000 and more), as a hue from green to red."""
    if r64 is None:
        return "var(--faint)"
    if not math.isfinite(r64):
        return "hsl(0 75% 50%)"
    return f"hsl({140 - 140 * min(1.0, max(0.0, math.log10(max(r64, 1)) / 3)):.0f} 60% 45%)"


def bars(counts: Sequence[int]) -> dict[str, Any]:
    """The histogram as one path of bars, 18 pixels each, and in words. Empty bins at the end are left out."""
    last = max((place for place, count in enumerate(counts) if count), default=-1)
    most = max(counts, default=1)
    heights = [1 + round(60 * math.log1p(count) / math.log1p(most)) if count else 1 for count in counts[: last + 1]]
    limits = ["equal", *(f"≤{2**place}" for place in range(len(counts) - 2)), "more"]
    words = (f"{limit}: {count}" for limit, count in zip(limits, counts[: last + 1], strict=False) if count)
    path = "".join(f"M{18 * place} 62v-{height}h15v{height}" for place, height in enumerate(heights))
    return {"path": path, "width": 18 * len(heights) + 2, "words": ", ".join(words)}


def heat_map(rows: list[list[float]]) -> str:
    """A map of distances as an image: black is the smallest, white the largest, on a logarithmic scale."""
    logs = [[math.log10(value) if value > 0 else -400.0 for value in row] for row in rows]
    top = max(max(row) for row in logs)
    bottom = max(min((value for row in logs for value in row if value > -400), default=top), top - 6)
    spread = (top - bottom) or 1.0
    levels = bytes(round(255 * min(1.0, max(0.0, (value - bottom) / spread))) for row in logs for value in row)
    return as_data(Image.frombytes("L", (len(rows[0]), len(rows)), levels))


# ---- all together ----------------------------------------------------------------------------------------


def growth(verdict: Verdict) -> dict[str, Any]:
    """Error along the ladder: B's distance from A in float64, beside A's own rounding."""
    rungs = [rung for rung in verdict.rungs if rung.floor is not None and rung.error is not None]
    left, top, right, bottom = MARGIN
    width, height = CHART[0] - left - right, CHART[1] - top - bottom

    def x(place: int) -> float:
        return round(left + width * (place + 0.5) / max(1, len(rungs)), 1)

    def y(value: float | None) -> float:
        power = math.log10(value) if value and math.isfinite(value) else (HIGHEST if value else LOWEST)
        return round(top + height * (HIGHEST - min(HIGHEST, max(LOWEST, power))) / (HIGHEST - LOWEST), 1)

    def line(values: Iterable[float | None]) -> str:
        return " ".join(f"{x(place)},{y(value)}" for place, value in enumerate(values))

    return {
        "size": CHART,
        "floor": line(rung.floor for rung in rungs),
        "error": line(rung.error for rung in rungs),
        "marks": [
            {"x": x(place), "name": rung.name, "floor": y(rung.floor), "error": y(rung.error), "rung": rung}
            for place, rung in enumerate(rungs)
        ],
        "grid": [{"y": y(10.0**power), "power": power} for power in range(LOWEST + 2, HIGHEST + 1, 3)],
        "foot": top + height,
    }


def matrix(verdict: Verdict) -> list[dict[str, Any]]:
    """Blocks x stages, coloured by R64: a row for each block."""
    table = verdict.matrix
    return [
        {
            "name": block,
            "cells": [
                {"stage": stage, "r64": row[place], "heat": heat_colour(row[place])}
                for stage, row in zip(table.stages, table.r64, strict=True)
            ],
        }
        for place, block in enumerate(table.blocks)
    ]


def pictures(pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """A's images, B's, and their differences, enlarged by a power of two so that the largest just can be shown."""
    apart = (pair[1] - pair[0]).abs().nan_to_num(nan=2.0).clamp(max=2)
    largest = float(apart.max())
    factor = 2 ** math.floor(math.log2(2 / largest)) if largest else 1
    columns = (to_pictures(images) for images in (*pair, apart * factor - 1))
    rows = [dict(zip(("a", "b", "difference"), map(as_data, row), strict=True)) for row in zip(*columns, strict=True)]
    return {"rows": rows, "factor": factor if largest else 0}
