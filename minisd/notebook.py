"""How things show themselves in a notebook: tables, and a progress bar.

    for step in progress(sd.denoise("red heart", steps=10, seed=1), 10):
        print(step.index)

This file needs the standard library only.
"""

import html
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
MOST = 100  # rows of a table


def table(
    title: str, rows: Mapping[str, Any] | Iterable[Sequence[Any]], heads: Sequence[str] = (), after: str = ""
) -> str:
    """A table as HTML: a name and a value in each row, or `heads` and rows under them. Everything is escaped."""
    cells = list(rows.items() if isinstance(rows, Mapping) else rows)
    body = [line("th", heads)] if heads else []
    body += [line("td", row) for row in cells[:MOST]]
    more = f"<p>and {len(cells) - MOST:,} more</p>" if len(cells) > MOST else ""
    return f"<strong>{html.escape(title)}</strong><table>{''.join(body)}</table>{more}{after}"


def line(kind: str, values: Sequence[Any]) -> str:
    cells = (f"<{kind} style='text-align: left'>{html.escape(said(value))}</{kind}>" for value in values)
    return f"<tr>{''.join(cells)}</tr>"


def said(value: Any) -> str:
    """A value in a cell: numbers with as many digits as are read."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def curve(values: Sequence[float], marks: Sequence[int] = (), width: int = 320, height: int = 100) -> str:
    """Values from 0 to 1 as a line, some of them marked."""
    points = [(width * place / max(1, len(values) - 1), height * (1 - value)) for place, value in enumerate(values)]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f"<circle cx='{points[mark][0]:.1f}' cy='{points[mark][1]:.1f}' r='2.5'/>" for mark in marks)
    return (
        f"<svg viewBox='-4 -4 {width + 8} {height + 8}' width='{width}' fill='currentColor'>"
        f"<polyline points='{drawn}' fill='none' stroke='currentColor'/>{dots}</svg>"
    )


def progress(steps: Iterable[Item], total: int) -> Iterator[Item]:
    """The same steps, under a progress bar: in a notebook one of HTML, that needs no widgets, else tqdm's."""
    shell = sys.modules.get("IPython")
    if shell is None or type(shell.get_ipython()).__name__ != "ZMQInteractiveShell":
        from tqdm import tqdm

        yield from tqdm(steps, total=total, unit="step", leave=False)
        return
    display = shell.display
    handle = display.display(display.HTML(bar(0, total)), display_id=True)
    for count, step in enumerate(steps, 1):
        handle.update(display.HTML(bar(count, total)))
        yield step


def bar(count: int, total: int) -> str:
    return f"<progress value='{count}' max='{total}'></progress> step {count} of {total}"
