"""Each program beside this file runs twice: as it stands, and with its import lines changed to `minisd.diffusers`."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from minisd.checkpoint.hub import embedded_model

HERE = Path(__file__).parent
PROGRAMS = sorted(path for path in HERE.glob("*.py") if not path.name.startswith(("test_", "__")))
IMPORT = re.compile(r"^from (diffusers|transformers)(?=[. ])", flags=re.MULTILINE)


def results(source: str, name: str) -> dict[str, torch.Tensor]:
    """Run a program on the model that comes with minisd."""
    space: dict = {"__name__": name}
    exec(compile(source, name, "exec"), space)
    return {key: as_tensor(value) for key, value in space["main"](str(embedded_model())).items()}


def as_tensor(value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_program(path):
    source = path.read_text(encoding="utf-8")
    changed, lines = IMPORT.subn("from minisd.diffusers", source)
    assert lines and not re.search(r"^\s*(from|import) (diffusers|transformers)", changed, flags=re.MULTILINE)
    theirs, mine = results(source, path.name), results(changed, path.name)
    assert list(mine) == list(theirs)
    for key in theirs:
        assert theirs[key].dtype == mine[key].dtype and torch.equal(theirs[key], mine[key]), key
        assert not theirs[key].is_floating_point() or theirs[key].isfinite().all(), f"{key} proves nothing"


def test_programs_look_at_different_things():
    """Lest a program that returns nothing, or a constant, should count."""
    assert len(PROGRAMS) >= 8
    for path in PROGRAMS:
        assert "def main(folder)" in path.read_text(encoding="utf-8"), path
