"""The Python code on a README page, run as it stands there: for the tests, and for the page's own images."""

import os
import re
from pathlib import Path
from typing import Any

import torch

import minisd
import minisd.checkpoint

REPOSITORY = Path(__file__).parents[1]


def run_section(title: str, folder: Path, page: str = "README.md") -> dict[str, Any]:
    """Run the code under a page's heading `title`, block after block, in `folder`; returns all that it named."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    section = re.split(r"\n#+ ", text.partition(f"# {title}\n")[2])[0]
    names: dict[str, Any] = {"minisd": minisd, "torch": torch}
    (folder / "weights").symlink_to(REPOSITORY / "weights")
    here = Path.cwd()
    os.chdir(folder)
    try:
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
            exec(block, names)
    finally:
        os.chdir(here)
    return names
