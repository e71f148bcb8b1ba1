"""One module, three names: the key table's rows without `.weight` and `.bias`, and the containers that they stand in.

A container has the same name in two dialects where it holds the same weights: minisd's `unet.down.0.attention` holds
what diffusers' `down_blocks.0.attentions.0` holds. Of several around the same weights the innermost match, then the
next. This file needs the standard library only.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from minisd.checkpoint.keymap import COMPVIS_PREFIX, KEYS

Contents = Mapping[str, frozenset[str]]  # a module's path -> the weights inside it, under minisd's names


@dataclass(frozen=True)
class ModuleNames:
    """One module. `minisd` begins with its component; the others are as in state dicts, "" where there is none."""

    minisd: str
    diffusers: str
    compvis: str

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(name for name in (self.minisd, self.diffusers, self.compvis) if name)


def prefixes(name: str) -> Iterable[str]:
    """a.b.weight -> a, a.b: every module around a weight."""
    parts = name.split(".")[:-1]
    return (".".join(parts[: end + 1]) for end in range(len(parts)))


def contents(weights: Mapping[str, str]) -> dict[str, frozenset[str]]:
    """Weights (a dialect's name -> minisd's name) -> what each module of that dialect holds."""
    inside: dict[str, set[str]] = defaultdict(set)
    for name, minisd in weights.items():
        for path in ("", *prefixes(name)):
            inside[path].add(minisd)
    return {path: frozenset(names) for path, names in inside.items()}


def same_contents(one: Contents, other: Contents) -> dict[str, str]:
    """Pair modules that hold the same weights: path of one -> path of the other."""
    pairs: dict[str, str] = {}
    there = by_contents(other)
    for weights, paths in by_contents(one).items():
        pairs.update(zip(paths, there.get(weights, []), strict=False))
    return pairs


def by_contents(modules: Contents) -> dict[frozenset[str], list[str]]:
    """Weights -> the modules that hold exactly those, innermost first."""
    groups: dict[frozenset[str], list[str]] = defaultdict(list)
    for path in sorted(modules, key=lambda path: -path.count(".") - bool(path)):
        groups[modules[path]].append(path)
    return groups


def weight_names(component: str, config: Any, dialect: str) -> dict[str, str]:
    """Each weight's name in a dialect ("minisd", "diffusers", "compvis") -> its name in minisd."""
    return {getattr(key, dialect): key.minisd for key in KEYS[component](config)}


@lru_cache
def module_names(component: str, config: Any) -> tuple[ModuleNames, ...]:
    """Every module of a component that holds weights, under its three names."""
    own = contents(weight_names(component, config, "minisd"))
    theirs = {
        dialect: same_contents(own, contents(weight_names(component, config, dialect)))
        for dialect in ("diffusers", "compvis")
    }
    prefix = COMPVIS_PREFIX[component]
    return tuple(
        ModuleNames(
            f"{component}.{path}".rstrip("."),
            theirs["diffusers"].get(path, ""),
            f"{prefix}{theirs['compvis'][path]}".rstrip(".") if path in theirs["compvis"] else "",
        )
        for path in own
    )
