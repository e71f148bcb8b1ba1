"""A report in words: what `minisd inspect` and `minisd keys` print. This file needs the standard library only."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from minisd.checkpoint.header import TensorInfo
from minisd.checkpoint.keymap import COMPONENTS, COMPVIS_PREFIX, model_keys
from minisd.checkpoint.naming import TITLES
from minisd.config import SD15
from minisd.files import shown
from minisd.lab.weights.inspect import Report, naming

SHOWN = 5  # names of a kind


def lines(report: Report) -> Iterable[str]:
    """The report for a person."""
    yield shown(report.path, 500)
    yield f"  {report.what}"
    yield f"  {report.tensors:,} tensors, {amount(report.bytes)}"
    if report.official:
        yield f"  has the size and the number of tensors of the official {report.official}"
    for name, part in report.parts.items():
        state = "complete" if part.complete else f"INCOMPLETE, {len(part.sources):,} tensors"
        dtypes = ", ".join(
            f"{dtype} ({count})" if len(part.dtypes) > 1 else dtype for dtype, count in part.dtypes.items()
        )
        title = name.replace(part.component, TITLES[part.component])
        yield f"  {title}: {state}; {naming(part)}; {dtypes}; {part.parameters:,} parameters, {amount(part.bytes)}"
        yield from few("missing", part.missing)
        yield from few("of another shape", part.misshapen)
    for kind, names in report.leftovers.items():
        some = ", ".join([*(shown(name, 60) for name in names[:2]), *(["..."] if len(names) > 2 else [])])
        yield f"  beside it: {len(names):,} x {kind} ({some})"
    for hint in report.hints:
        yield f"  hint: {hint}"
    for key, value in report.metadata.items():
        yield f"  metadata {shown(key, 60)}: {shown(value, 90)}"
    for warning in report.warnings:
        yield f"  warning: {warning}"
    yield (
        f"  minisd cannot load it as a model: {shown(report.problem, 1000)}" if report.problem else "  minisd loads it"
    )


def few(label: str, names: list[str]) -> Iterable[str]:
    """The first names, and how many more."""
    for name in names[:SHOWN]:
        yield f"    {label}: {shown(name)}"
    if len(names) > SHOWN:
        yield f"    {label}: and {len(names) - SHOWN:,} more"


def amount(size: int) -> str:
    """4,265,146,304 -> 4.27 GB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"


# ---- the tree --------------------------------------------------------------------------------------------


@dataclass
class Branch:
    """A block: what it holds in all, and the blocks in it."""

    parameters: int = 0
    bytes: int = 0
    branches: dict[str, "Branch"] = field(default_factory=dict)


def tree(report: Report, depth: int) -> Iterable[str]:
    """The parameters by block, under minisd's names, `depth` levels deep."""
    root = Branch()
    for title, part in report.parts.items():
        for ours, name in part.sources.items():
            grow(root, [title, *ours.split(".")[:-1]], part.files.tensors[name])
    yield from drawn(root, "", depth)


def grow(root: Branch, path: list[str], info: TensorInfo) -> None:
    branch = root
    for step in path:
        branch = branch.branches.setdefault(step, Branch())
        branch.parameters += prod(info.shape)
        branch.bytes += info.end - info.start


def drawn(branch: Branch, indent: str, depth: int) -> Iterable[str]:
    if depth == 0:
        return
    for name, inner in branch.branches.items():
        label = f"{indent}{name}"
        yield f"{label:<44} {inner.parameters:>13,}  {amount(inner.bytes):>10}"
        yield from drawn(inner, indent + "  ", depth - 1)


# ---- the three names -------------------------------------------------------------------------------------


def key_table() -> Iterable[tuple[str, str, str, str]]:
    """SD 1.5's 1,130 weights: minisd's name, diffusers', CompVis' and the shape."""
    for component in COMPONENTS:
        for key in model_keys(SD15)[component]:
            compvis = COMPVIS_PREFIX[component] + key.compvis
            yield f"{component}.{key.minisd}", f"{component}/{key.diffusers}", compvis, shape_text(key.shape)


def file_table(report: Report) -> Iterable[tuple[str, str, str, str]]:
    """A file's tensors: minisd's name, the file's, dtype and shape; last those that are no weight of a model."""
    used = set()
    for title, part in report.parts.items():
        for ours, name in part.sources.items():
            used.add((id(part.files), name))
            info = part.files.tensors[name]
            yield f"{title}.{ours}", shown(name), info.dtype, shape_text(info.shape)
    for files in report.files:
        for name, info in files.tensors.items():
            if (id(files), name) not in used:
                yield "-", shown(name), info.dtype, shape_text(info.shape)


def shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"


def aligned(rows: list[tuple[str, ...]]) -> Iterable[str]:
    """Columns beside one another."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
