"""The rules of the house: who may import whom, and what `import minisd` costs."""

import ast
import graphlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minisd

PACKAGE = Path(minisd.__file__).parent
REPOSITORY = PACKAGE.parent
MODELS = ("minisd.unet", "minisd.vae", "minisd.text_encoder")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def statements(tree: ast.AST, *, nested: bool):
    """All statements below `tree` that run; with `nested`, those inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt) and not is_for_type_checkers(node):
            yield node
            if nested or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from statements(node, nested=nested)


def imports(module: str, *, nested: bool = True) -> set[str]:
    """The modules that `module` imports, by their full names."""
    path = SOURCES[module]
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")), nested=nested):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            for alias in node.names:  # a name in a package may be a module
                full = f"{node.module}.{alias.name}"
                found.add(full if full in SOURCES else node.module)
    return found


def inside(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] == "minisd"}


def reachable(module: str, *, nested: bool) -> set[str]:
    """Everything that importing `module` imports, modules of minisd and others."""
    seen: set[str] = set()
    waiting = {module}
    while waiting:
        name = waiting.pop()
        seen.add(name)
        if name in SOURCES:
            # A module's packages are imported with it.
            parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)}
            waiting |= (imports(name, nested=nested) | parents) - seen
    return seen


def test_the_parser_sees_what_is_there():
    """Lest the rules below hold for want of sight."""
    assert {"minisd.layers", "minisd.config", "torch"} <= imports("minisd.unet")
    assert {"minisd.files", "minisd.config"} <= reachable("minisd.checkpoint.keymap", nested=False)
    assert "huggingface_hub" in imports("minisd.checkpoint.hub")
    assert "huggingface_hub" not in imports("minisd.checkpoint.hub", nested=False)
    assert "torch" in reachable("minisd.pipeline", nested=False)


# From the ground floor up: a module imports from its own floor and from those below, also inside its functions. The
# longest name that fits says where a module belongs.
FLOORS = (
    ("minisd", "minisd.files", "minisd.checks", "minisd.config", "minisd.noise", "minisd.notebook"),
    ("minisd.layers", "minisd.tiling", "minisd.schedulers", "minisd.tokenizer", "minisd.checkpoint.keymap"),
    ("minisd.unet", "minisd.vae", "minisd.text_encoder", "minisd.sampling", "minisd.context", "minisd.metadata"),
    ("minisd.checkpoint",),
    ("minisd.pixel", "minisd.tiny_vae"),
    (
        "minisd.adapters",
        "minisd.lab.hooks",
        "minisd.lab.names",
        "minisd.lab.page",
        "minisd.lab.sources",
        "minisd.lab.taps",
        "minisd.backends",
    ),
    ("minisd.model", "minisd.pipeline", "minisd.pixel.pipeline", "minisd.xl"),
    ("minisd.tasks", "minisd.batch"),
    ("minisd.diffusers", "minisd.lab"),
    ("minisd.explain",),
    ("minisd.studio",),
    ("minisd.cli", "minisd.__main__"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def floor_of(module: str) -> int:
    while module not in FLOOR:
        module = module.rpartition(".")[0]
    return FLOOR[module]


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down(module):
    above = [name for name in sorted(inside(imports(module))) if floor_of(name) > floor_of(module)]
    assert above == []


def test_no_module_imports_itself_by_way_of_others():
    """Also inside functions: a cycle hidden there is one all the same."""
    order = graphlib.TopologicalSorter({module: inside(imports(module)) - {"minisd"} for module in SOURCES})
    order.prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("module", MODELS)
def test_models_know_layers_and_config_only(module):
    """They never import each other: each can be read, and used, alone."""
    assert inside(imports(module)) <= {"minisd.layers", "minisd.config", "minisd.noise"}


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("minisd.schedulers")])
def test_schedulers_know_no_network_and_no_checkpoint(module):
    allowed = {name for name in SOURCES if name.startswith("minisd.schedulers")}
    assert inside(reachable(module, nested=True)) <= allowed | {
        "minisd",
        "minisd.noise",
        "minisd.files",
        "minisd.checks",
        "minisd.notebook",
    }


@pytest.mark.parametrize("module", [name for name in SOURCES if name.startswith("minisd.adapters")])
def test_adapters_know_files_and_words_but_no_network(module):
    """They change modules that they are handed."""
    found = inside(imports(module)) - {"minisd.config", "minisd.tokenizer", "minisd.files", "minisd.warn"}
    assert all(name.startswith(("minisd.adapters", "minisd.checkpoint")) for name in found)


def says_of_itself(module: str, words: str) -> bool:
    text = ast.get_docstring(ast.parse(SOURCES[module].read_text(encoding="utf-8"))) or ""
    return words in " ".join(text.split())


LIGHT = {"minisd", "minisd.config", "minisd.checkpoint.keymap", "minisd.files"}
LIGHT |= {module for module in SOURCES if says_of_itself(module, "needs the standard library only")}


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_what_needs_the_standard_library_only(module):
    """The key table, the configuration, and every file that says so of itself."""
    others = {name.split(".")[0] for name in reachable(module, nested=False)} - {"minisd"}
    assert others <= sys.stdlib_module_names


COMPARES = "minisd.lab.parity.sides"  # opens diffusers where somebody asks for a comparison with it, and only then


@pytest.mark.parametrize("module", SOURCES)
def test_nothing_leans_on_what_it_reimplements(module):
    found = imports(module, nested=module != COMPARES)
    assert not {name.split(".")[0] for name in found} & {"diffusers", "transformers", "accelerate"}


def test_the_command_waits_for_torch_until_it_needs_it():
    program = "import sys, minisd.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & (set(HEAVY) - {"click"})


# ------------------------------------------------ import minisd

HEAVY = "torch numpy einops PIL safetensors huggingface_hub tokenizers tqdm click transformers diffusers".split()


def test_importing_minisd_loads_nothing_and_prints_nothing():
    program = (
        "import sys; before = set(sys.modules); import minisd; new = set(sys.modules) - before\n"
        f"heavy = [name for name in {HEAVY} if name in new]\n"
        "ours = sorted(name for name in new if name.startswith('minisd.'))\n"
        "sys.exit(repr((heavy, ours)) if heavy or ours else 0)"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_public_names():
    assert set(minisd.__all__) <= set(dir(minisd))
    for name in minisd.__all__:
        assert getattr(minisd, name).__doc__ or name == "SD15"
    assert "StableDiffusion" in minisd.__all__ and "CheckpointError" in minisd.__all__
    assert issubclass(minisd.CheckpointError, ValueError)
    with pytest.raises(AttributeError, match="no attribute 'StableDifusion'"):
        _ = minisd.StableDifusion


def test_public_names_are_told_to_type_checkers_too():
    """`__init__` lists them twice: for Python, which is lazy, and for tools, which read."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if is_for_type_checkers(node)]
    assert {alias.asname for node in block.body for alias in node.names} == set(minisd.__all__)


# ------------------------------------------------ no place but this one


@pytest.mark.skipif(not shutil.which("git") or not (REPOSITORY / ".git").exists(), reason="not a git checkout")
def test_no_file_knows_the_machine_that_it_was_written_on():
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    guilty = []
    for name in filter(None, names):
        path = REPOSITORY / name
        if name.startswith("tests/") or not path.is_file():
            continue
        data = path.read_bytes()
        if b"\0" not in data[:8000]:
            lines = data.decode("utf-8", errors="replace").splitlines()
            guilty += [f"{name}:{n}" for n, line in enumerate(lines, 1) if "/root/" in line or "/work/" in line]
    assert guilty == []
