"""The code blocks on the pages, run as they stand there: for the tests, and for the pages' own figures.

A block is fenced as `sh` or `python`. One that cannot run has the line `<!-- not run: REASON -->` above its fence.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:^<!-- not run: (?P<reason>.+) -->\n)?^```(?P<kind>sh|python)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A block of code on a page: `kind` is "sh" or "python", `reason` why it is not run, or None."""

    kind: str
    code: str
    reason: str | None


def blocks(text: str) -> list[Block]:
    """The blocks of a page, in order."""
    return [Block(found["kind"], found["code"], found["reason"]) for found in BLOCK.finditer(text)]


def pages() -> list[Path]:
    """Every page of the project."""
    return sorted(
        path for path in REPOSITORY.rglob("README.md") if ".git" not in path.parts and path.parts[-2] != "runs"
    )


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in `folder`, where the repository's weights and scripts are too."""
    for name in ("weights", "scripts"):
        (folder / name).symlink_to(REPOSITORY / name)
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def run_section(page: str, title: str, folder: Path) -> dict[str, Any]:
    """Run the Python blocks under the heading `title` of a page, one after the other; returns all that they named."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    section = re.split(r"\n#+ ", text.partition(f"# {title}\n")[2])[0]
    names: dict[str, Any] = {}
    with inside(folder):
        for block in blocks(section):
            if block.kind == "python" and block.reason is None:
                exec(block.code, names)
    return names
