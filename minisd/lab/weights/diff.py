"""Two checkpoints side by side, across layouts, dialects and precisions: what is the same, what changed, and how much.

    difference = compare("a.safetensors", "folder-b")
    print(difference.verdicts, difference.blocks)

Weights meet under minisd's names. One pair of tensors is in memory at a time.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from minisd.checkpoint.naming import TITLES
from minisd.checkpoint.survey import Part
from minisd.checkpoint.values import Values
from minisd.files import CheckpointError
from minisd.lab.weights.inspect import Report, inspect

MOVERS = 10  # weights that are listed because they changed most


@dataclass
class Change:
    """One weight in both: how far apart the two are."""

    name: str  # minisd's
    equal: bool  # bit for bit
    equal_in_half: bool  # after rounding both to float16
    relative: float  # |a - b| / |a|, Euclidean norms; infinite if a is all zero and b is not
    cosine: float
    squares: tuple[float, float]  # |a - b|^2 and |a|^2, to add up over a block


@dataclass
class Sum:
    """Several weights together."""

    weights: int = 0
    changed: int = 0
    difference: float = 0.0  # squared
    size: float = 0.0  # squared

    @property
    def relative(self) -> float:
        return quotient(math.sqrt(self.difference), math.sqrt(self.size))

    def add(self, change: Change) -> None:
        self.weights += 1
        self.changed += not change.equal
        self.difference += change.squares[0]
        self.size += change.squares[1]

    def as_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "changed": self.changed, "relative": finite(self.relative)}


@dataclass
class Difference:
    """All that differs. `components` and `blocks` add up the changes; `only` lists what one side alone has."""

    a: str
    b: str
    changes: list[Change]
    components: dict[str, Sum]
    blocks: dict[str, Sum]
    only: dict[str, list[str]]  # "a", "b" -> minisd's names
    misshapen: list[str]
    settings: list[str] = field(default_factory=list)  # of configuration and schedule, what differs, in words
    verdicts: list[str] = field(default_factory=list)

    @property
    def movers(self) -> list[Change]:
        changed = (change for change in self.changes if not change.equal)
        return sorted(changed, key=lambda change: -change.relative)[:MOVERS]

    @property
    def same(self) -> bool:
        others = self.settings or self.misshapen or any(self.only.values())
        return not others and all(change.equal for change in self.changes)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "verdicts": self.verdicts,
            "settings": self.settings,
            "components": {name: one.as_dict() for name, one in self.components.items()},
            "blocks": {name: one.as_dict() for name, one in self.blocks.items()},
            "only": self.only,
            "misshapen": self.misshapen,
            "movers": [
                {"name": c.name, "relative": finite(c.relative), "cosine": finite(c.cosine)} for c in self.movers
            ],
        }


def finite(number: float) -> float | None:
    """For JSON, which knows no infinity."""
    return number if math.isfinite(number) else None


def compare(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, advance: Callable[[int], object] = lambda _: None
) -> Difference:
    """Compare two checkpoints weight by weight. `advance` is told after each pair.

    Raises CheckpointError for what is no weight file, or where the two have no component in common.
    """
    one, other = inspect(a), inspect(b)
    pairs = common(one, other)
    if not pairs:
        raise CheckpointError(f"{one.path} is {one.what}, {other.path} is {other.what}: nothing to compare")
    difference = Difference(one.path, other.path, [], {}, {}, {"a": [], "b": []}, [])
    for title, (left, right) in pairs.items():
        walk(difference, title, left, right, advance)
    for side, report, paired in (("a", one, 0), ("b", other, 1)):
        used = {id(pair[paired]) for pair in pairs.values()}
        for title, part in report.parts.items():
            if id(part) not in used:
                difference.only[side] += [f"{title}.{name}" for name in part.sources]
    difference.settings = [text for pair in pairs.values() for text in other_settings(*pair)]
    difference.settings += [f"only {side} says: {hint}" for side, hint in other_hints(one, other)]
    difference.verdicts = list(verdicts(difference, one, other))
    return difference


def other_settings(left: Part, right: Part) -> Iterable[str]:
    """What the configurations of a component do not have in common."""
    for name, value in vars(left.config).items():
        if getattr(right.config, name) != value:
            yield f"{TITLES[left.component]}: {name} is {value} in A and {getattr(right.config, name)} in B"


def other_hints(one: Report, other: Report) -> Iterable[tuple[str, str]]:
    """What only one of two files says of how it wants to be sampled."""
    for side, mine, theirs in (("A", one.hints, other.hints), ("B", other.hints, one.hints)):
        said = {hint.partition(" (")[0] for hint in theirs}  # wherever it says so
        yield from ((side, hint) for hint in mine if hint.partition(" (")[0] not in said)


def common(one: Report, other: Report) -> dict[str, tuple[Part, Part]]:
    """The parts that both have. A UNet that is raw on one side only meets the averaged one of the other."""
    pairs = {title: (part, other.parts[title]) for title, part in one.parts.items() if title in other.parts}
    if not any(title.startswith("unet") for title in pairs):
        unets = [[part for title, part in side.parts.items() if title.startswith("unet")] for side in (one, other)]
        if all(unets):
            pairs["unet"] = unets[0][0], unets[1][0]
    return pairs


def walk(difference: Difference, title: str, left: Part, right: Part, advance: Callable[[int], object]) -> None:
    """Compare one part and add it up."""
    one, other = Values(left.files, left.match), Values(right.files, right.match)
    for name in one:
        if name not in other:
            difference.only["a"].append(f"{title}.{name}")
            continue
        if one.shape(name) != other.shape(name):
            difference.misshapen.append(f"{title}.{name}")
            continue
        change = measure(f"{title}.{name}", one, other, name)
        difference.changes.append(change)
        difference.components.setdefault(title, Sum()).add(change)
        difference.blocks.setdefault(block_of(change.name), Sum()).add(change)
        advance(1)
    difference.only["b"] += [f"{title}.{name}" for name in right.sources if name not in left.sources]


def block_of(name: str) -> str:
    """unet.down.3.resnet.conv1.weight -> unet.down.3; vae.encoder.down.3.... -> vae.encoder.down."""
    return ".".join(name.split(".")[:3]) if "." in name else name


def measure(title: str, one: Values, other: Values, name: str) -> Change:
    """How far two tensors of one shape are apart, in float64, a few rows at a time."""
    equal, half = True, True
    apart = size = length = product = 0.0
    for (_, a), (_, b) in zip(one.pieces(name), other.pieces(name), strict=True):
        same = a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # NaN equals itself then
        half = half and (same or torch.equal(a.half(), b.half()))
        x, y = a.double().flatten(), b.double().flatten()
        equal = equal and (same or torch.equal(x, y))
        apart += float((x - y).square().sum())
        size, length, product = size + float(x @ x), length + float(y @ y), product + float(x @ y)
    if equal and not math.isfinite(size):
        return Change(title, True, True, 0.0, 1.0, (0.0, 0.0))
    cosine = quotient(product, math.sqrt(size * length)) if size and length else float(size == length)
    return Change(title, equal, half, math.sqrt(quotient(apart, size)), cosine, (apart, size))


def quotient(over: float, under: float) -> float:
    """over / under; 0 / 0 is no change."""
    if under == 0:
        return 0.0 if over == 0 else math.inf
    return over / under


# ---- in words --------------------------------------------------------------------------------------------


def verdicts(difference: Difference, one: Report, other: Report) -> Iterable[str]:
    """What one would say about the two, most telling first."""
    parts = difference.components
    changed = [title for title, part in parts.items() if part.changed]
    if difference.same:
        yield "A and B are the same model"
    elif difference.settings and not changed and not difference.misshapen and not any(difference.only.values()):
        yield "A and B have the same weights and other settings"
    elif not changed and not difference.misshapen:
        yield "every weight that both have is the same"
    elif all(change.equal_in_half for change in difference.changes) and not difference.misshapen:
        yield "A and B are equal after rounding to float16"
    names = [TITLES.get(title, title) for title in changed]
    if len(parts) > 2 and len(changed) == 1 and not difference.misshapen:
        yield f"A is B with another {names[0]}"
    yield from averages(one, other)


def averages(one: Report, other: Report) -> Iterable[str]:
    """ "A's UNet is B's average" and the other way round, where one file has both sets."""
    for (name, report), (other_name, whole) in ((("A", one), ("B", other)), (("B", other), ("A", one))):
        raw, average = report.parts.get("unet"), whole.parts.get("unet (averaged)")
        if raw and average and all_equal(raw, average):
            yield f"{name}'s UNet is {other_name}'s averaged (EMA) UNet"


def all_equal(left: Part, right: Part) -> bool:
    """Whether two parts hold the same values, up to float16's rounding. Stops at the first difference."""
    one, other = Values(left.files, left.match), Values(right.files, right.match)
    return one.keys() == other.keys() and all(
        torch.equal(a.half(), b.half())
        for name in one
        for (_, a), (_, b) in zip(one.pieces(name), other.pieces(name), strict=True)
    )


def lines(difference: Difference) -> Iterable[str]:
    """The comparison for a person."""
    yield f"A {difference.a}"
    yield f"B {difference.b}"
    for verdict in difference.verdicts:
        yield f"  {verdict}"
    for title, part in difference.components.items():
        state = (
            f"{part.changed:,} of {part.weights:,} weights changed, by {part.relative:.2%}" if part.changed else "same"
        )
        yield f"  {title}: {state}"
    for text in difference.settings:
        yield f"  {text}"
    for side, names in difference.only.items():
        if names:
            yield f"  only in {side.upper()}: {len(names):,} weights such as {names[0]}"
    for name in difference.misshapen[:MOVERS]:
        yield f"  of another shape: {name}"
    for change in difference.movers:
        yield f"  moved {change.relative:9.2%}, cosine {change.cosine:+.4f}: {change.name}"


def bars(blocks: Mapping[str, Sum], width: int = 720) -> Image.Image:
    """A bar chart: the relative change of each block."""
    line, left = 16, 230
    most = max((one.relative for one in blocks.values() if math.isfinite(one.relative)), default=0.0) or 1.0
    image = Image.new("RGB", (width, line * len(blocks) + 2 * line), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=11)
    for row, (name, one) in enumerate(blocks.items()):
        y = line + row * line
        length = (width - left - 90) * min(1.0, one.relative / most)
        pen.text((8, y), name, fill="black", font=font)
        pen.rectangle((left, y + 2, left + max(0.0, length), y + line - 4), fill=(70, 110, 190))
        pen.text((left + length + 6, y), f"{one.relative:.2%}", fill=(90, 90, 90), font=font)
    return image
