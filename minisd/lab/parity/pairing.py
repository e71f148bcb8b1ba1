"""Which module of A is which of B.

In: two networks, each with what its weights are called in minisd. Out: twins, in A's order, each with the twins around
it. Modules that hold the same weights are twins; between two copies of one code, those at the same path are. For a part
of the user's own a name map says which of its modules is which; the others are found by their copied weights. What
has no twin is compared as a part of the module around it. Next: `replay.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from minisd.lab.names import contents, module_names, same_contents, weight_names

LISTS = (nn.ModuleList, nn.ModuleDict)  # modules that hold others and cannot be called


@dataclass
class Network:
    """One component of a side, and how its parts are called in minisd.

    `weights`: its own name of a weight -> minisd's, where a dialect of the key table fits; `modules`: its own path of a
    module -> a name in any dialect, where somebody wrote that down.
    """

    component: str
    root: nn.Module
    config: Any = None  # minisd's, to expand the key table
    weights: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)

    def callable_contents(self) -> dict[str, frozenset[str]]:
        """Path -> weights, of the modules that can be called."""
        lists = {path for path, module in self.root.named_modules() if isinstance(module, LISTS)}
        return {path: names for path, names in contents(self.weights).items() if path not in lists}

    @cached_property
    def canonical(self) -> dict[str, str]:
        """Path -> minisd's path within the component, where there is one. Names that were given come first."""
        named = {path: resolve(self.component, self.config, name) for path, name in self.modules.items()}
        if self.config is None or (self.modules and not self.weights):
            return named
        own = contents(weight_names(self.component, self.config, "minisd"))
        by_weights = same_contents(contents(self.weights), own)
        taken = set(named.values())
        return named | {path: name for path, name in by_weights.items() if path not in named and name not in taken}


@dataclass
class Twins:
    """Two modules that should do the same."""

    name: str
    a_path: str
    b_path: str
    a: nn.Module
    b: nn.Module
    parent: str = ""


def resolve(component: str, config: Any, name: str) -> str:
    """A module's name in any dialect -> minisd's path within the component. Raises ValueError for a strange name."""
    for names in module_names(component, config) if config is not None else ():
        if name in names.all or f"{component}.{name}" == names.minisd:
            return names.minisd.removeprefix(component).removeprefix(".")
    if config is None:
        return name.removeprefix(component).removeprefix(".")
    raise ValueError(f"{name!r}: no module of a {component} has this name (see `minisd taps --list`)")


def pair_networks(a: Network, b: Network) -> list[Twins]:
    """All twins, parents before their children. Raises ValueError where there are none."""
    a_modules, b_modules = dict(a.root.named_modules()), dict(b.root.named_modules())
    paths = paired_paths(a, b, a_modules, b_modules)
    names = display_names(a, b, paths)
    twins = [
        Twins(names[path], path, paths[path], module, b_modules[paths[path]])
        for path, module in a_modules.items()
        if path in paths
    ]
    if not twins:
        raise ValueError(f"{a.component}: A and B have no module in common by name; give a name map")
    return with_parents(twins)


def with_parents(twins: list[Twins]) -> list[Twins]:
    """Each twin with the name of the closest one around it."""
    by_path = {twin.a_path: twin.name for twin in twins}
    for twin in twins:
        path = twin.a_path
        while path and not twin.parent:
            path = path.rpartition(".")[0]
            twin.parent = by_path.get(path, "")
    return twins


def paired_paths(a: Network, b: Network, a_modules: Mapping[str, Any], b_modules: Mapping[str, Any]) -> dict[str, str]:
    """A's path -> B's."""
    if a_modules.keys() == b_modules.keys() and type(a.root) is type(b.root):
        return {path: path for path, module in a_modules.items() if not isinstance(module, LISTS)}
    if a.modules or b.modules:
        there = {name: path for path, name in b.canonical.items() if path in b_modules}
        return {path: there[name] for path, name in a.canonical.items() if name in there and path in a_modules}
    return same_contents(a.callable_contents(), b.callable_contents())


def display_names(a: Network, b: Network, paths: Mapping[str, str]) -> dict[str, str]:
    """A's path -> the name that people see. Two modules around the same weights keep two names."""
    canonical_a, canonical_b = a.canonical, b.canonical
    names: dict[str, str] = {}
    for path, other in paths.items():
        name = canonical_a.get(path, canonical_b.get(other, path))
        full = f"{a.component}.{name}".rstrip(".")
        names[path] = full if full not in names.values() else f"{a.component}.{path}"
    return names


# ---- two modules without a component ---------------------------------------------------------------------


class Function(nn.Module):
    """A function that looks like a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def as_module(thing: Callable[..., Any]) -> nn.Module:
    return thing if isinstance(thing, nn.Module) else Function(thing)


def pair_modules(
    a: nn.Module, b: nn.Module, names: Mapping[str, str] | None, titles: tuple[str, str] = ("A", "B")
) -> list[Twins]:
    """Twins by `names` (B's path -> A's), or by equal paths; the two themselves in any case.

    Raises ValueError for a path that is not there.
    """
    if names is not None and not isinstance(names, Mapping):
        raise ValueError(f"names: must be a dict from paths in {titles[1]} to paths in {titles[0]}")
    mine, theirs = dict(a.named_modules()), dict(b.named_modules())
    pairs = {mine_path: path for path, mine_path in names.items()} if names is not None else {p: p for p in mine}
    for title, paths, modules in ((titles[0], pairs.keys(), mine), (titles[1], pairs.values(), theirs)):
        strange = [path for path in paths if path not in modules] if names is not None else []
        if strange:
            have = ", ".join(list(modules)[1:6])
            raise ValueError(f"names: {title} has no module {strange[0]!r}; it has {have or 'none'} ...")
    found = [
        Twins(path, path, pairs[path], module, theirs[pairs[path]])
        for path, module in mine.items()
        if path and pairs.get(path) in theirs and not isinstance(module, LISTS)
    ]
    return with_parents([Twins("(whole)", "", "", a, b), *found])


# ---- a part without names --------------------------------------------------------------------------------


def same_weights(reference: Network, place: str, part: nn.Module) -> dict[str, str]:
    """The weights of a part -> minisd's names of those in its counterpart at `place`.

    Modules are paired whose weights have the same numbers, then those whose shapes occur once on each side.
    """
    root = next((path for path, name in reference.canonical.items() if name == place), None)
    if root is None:
        return {}
    mine, theirs = with_weights(part), with_weights(reference.root.get_submodule(root))
    pairs: dict[str, str] = {}
    for key in (numbers_of, shapes_of):
        here = grouped({path: module for path, module in mine.items() if path not in pairs}, key)
        there = grouped({path: module for path, module in theirs.items() if path not in pairs.values()}, key)
        for what, paths in here.items():
            others = there.get(what, [])
            if len(paths) == len(others) and (key is numbers_of or len(paths) == 1):
                pairs.update(zip(paths, others, strict=True))
    names = {}
    for path, other in pairs.items():
        for weight, _ in mine[path].named_parameters(recurse=False):
            own = ".".join(filter(None, [root, other, weight]))
            if own in reference.weights:
                names[".".join(filter(None, [path, weight]))] = reference.weights[own]
    return names


def with_weights(root: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, of those with weights of their own."""
    return {
        path: module
        for path, module in root.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def grouped(modules: Mapping[str, nn.Module], key: Callable[[nn.Module], Any]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for path, module in modules.items():
        groups.setdefault(key(module), []).append(path)
    return groups


def shapes_of(module: nn.Module) -> Any:
    return tuple((name, tuple(weight.shape)) for name, weight in sorted(module.named_parameters(recurse=False)))


def numbers_of(module: nn.Module) -> Any:
    weights = sorted(module.named_parameters(recurse=False))
    return shapes_of(module), tuple(hash(weight.detach().cpu().float().numpy().tobytes()) for _, weight in weights)
