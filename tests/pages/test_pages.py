"""Every code block on the pages and in the docstrings, run as it stands there, on the embedded model."""

import ast
import copy
import importlib
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from page import REPOSITORY, Block, blocks, inside, pages

import minisd
from minisd.checkpoint.hub import embedded_model
from minisd.lab.weights.extract import extract
from minisd.layers import ResnetBlock

COMMANDS = {"minisd": [sys.executable, "-m", "minisd"], "python": [sys.executable]}
ELSEWHERE = ("pip install",)  # the continuous integration starts with these very lines


def run_line(line: str, folder: Path) -> None:
    """One line of a shell block: a command of minisd, or a Python script of this repository."""
    program, _, rest = line.partition(" ")
    assert program in COMMANDS, f"{line}: only minisd and python run here"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "100"}
    command = " ".join(["exec", *COMMANDS[program], rest])
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode in ((0, 1) if " parity " in line else (0,)), f"{line}\n{done.stdout}\n{done.stderr}"


def run(block: Block, names: dict, folder: Path) -> None:
    if block.kind == "python":
        exec(block.code, names)
        return
    for line in filter(None, block.code.splitlines()):
        if not line.startswith(ELSEWHERE):
            run_line(line, folder)


def test_there_are_pages_and_they_have_blocks():
    assert len(pages()) >= 9
    assert sum(block.reason is None for page in pages() for block in blocks(page.read_text(encoding="utf-8"))) >= 12


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(REPOSITORY).parent))
def test_page(page, tmp_path):
    """Its blocks in order, in one folder, the Python ones with shared names: as a reader would who follows it."""
    names: dict = {}
    with inside(tmp_path):
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.reason is None:
                run(block, names, tmp_path)


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(REPOSITORY).parent))
def test_links(page):
    """Files and headings that a page links to are there."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, heading = target.partition("#")
        linked = (page.parent / name) if name else page
        assert linked.exists(), f"{page}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.M)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


# ------------------------------------------------ docstrings


def is_code(text: str) -> bool:
    """Does an indented paragraph of a docstring hold Python statements that call something?"""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    kinds = (ast.With, ast.For, ast.Assign, ast.Import, ast.ImportFrom, ast.Expr)
    called = any(isinstance(node, ast.Call | ast.ImportFrom) for node in ast.walk(tree))
    return called and all(isinstance(statement, kinds) for statement in tree.body)


def examples() -> list[tuple[str, str]]:
    """(module, code) of each example in a docstring; one that cannot run begins with `# not run: REASON`."""
    found = []
    for path in sorted(Path(minisd.__file__).parent.rglob("*.py")):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                paragraphs = re.findall(r"(?:^(?: {4}.*)?\n?)+", ast.get_docstring(node) or "", re.M)
                codes = (textwrap.dedent(paragraph).strip("\n") for paragraph in paragraphs)
                found += [(module, code) for code in codes if code and is_code(code)]
    return found


@pytest.fixture(scope="session")
def shelf(tmp_path_factory) -> Path:
    """Files and folders under the names that docstrings give to a reader's own: the embedded model, and another."""
    folder = tmp_path_factory.mktemp("shelf")
    sd = minisd.StableDiffusion.load()
    for name in ("model", "a", "base", "v1-5-pruned-emaonly", "vae-ft-mse"):
        sd.save(folder / f"{name}.safetensors", layout="compvis")
    for name, weight in sd.state().items():
        if name.endswith("attn.q.weight"):
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for name in ("b", "tuned"):
        sd.save(folder / f"{name}.safetensors", layout="compvis")
    sd.save(folder / "folder-b")
    extract(folder / "base.safetensors", folder / "tuned.safetensors", rank=4, target=folder / "style.safetensors")
    return folder


def things() -> dict:
    """What else docstrings name without making it."""
    block = {"time_width": 8, "groups": 2, "eps": 1e-5, "activation": "silu"}
    names = {"reference": ResnetBlock(4, 4, **block), "x": torch.randn(1, 4, 16, 16), "time": torch.randn(1, 8)}
    names["candidate"] = copy.deepcopy(names["reference"])
    return {**names, "module": torch.nn.Conv2d(4, 4, 3), "model": lambda x, t: x, "folder": embedded_model()}


@pytest.mark.parametrize(
    ("module", "code"), [pytest.param(*one, id=f"{one[0]}-{n}") for n, one in enumerate(examples())]
)
def test_docstring(module, code, shelf, tmp_path):
    if code.startswith("# not run: "):
        return
    names = {**things(), **vars(importlib.import_module(module)), "minisd": minisd, "torch": torch}
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    names["sd"] = sd = minisd.StableDiffusion.load()
    sd.generation["steps"] = 3
    with inside(tmp_path):
        exec(code, names)


def test_docstrings_have_examples():
    assert len(examples()) >= 8


# ------------------------------------------------ scripts


@pytest.mark.parametrize("script", sorted((REPOSITORY / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_scripts_say_what_they_take(script):
    if "argparse" not in script.read_text(encoding="utf-8"):
        pytest.skip("a module of other scripts")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
