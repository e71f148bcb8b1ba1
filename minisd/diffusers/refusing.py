"""How the dialect says no: everything that it does not do is an error that names it and says what is done instead."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any


class NotCoveredError(NotImplementedError):
    """Something that diffusers does and `minisd.diffusers` does not."""


def accept(call: str, given: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], covered: list[str]) -> None:
    """Check the arguments that a call does nothing with: each must be in `neutral`, with one of the values there.

    `call` and `covered`, the arguments that it understands, are for the message. Raises NotCoveredError.
    """
    for name, value in given.items():
        if name not in neutral:
            raise NotCoveredError(
                f"{call}: {name} is not covered by minisd.diffusers, which takes {', '.join(covered)}"
            )
        if not any(
            value is allowed or (type(value) is type(allowed) and value == allowed) for allowed in neutral[name]
        ):
            allowed = " or ".join(repr(one) for one in neutral[name])
            raise NotCoveredError(
                f"{call}: {name}={shortened(value)} is not covered by minisd.diffusers, which takes {allowed} here"
            )


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's own parameters, for the messages of `accept`."""
    named = inspect.signature(function).parameters.values()
    return [one.name for one in named if one.name != "self" and one.kind != one.VAR_KEYWORD]


def missing(owner: object, name: str) -> AttributeError:
    """The error for `owner.name`. An AttributeError, so that `hasattr` says no."""
    kind = type(owner)
    own = (key for key in vars(owner) if not key.startswith("_"))
    covered = sorted(
        {*own, *(key for base in kind.__mro__ if base.__module__.startswith("minisd") for key in vars(base))}
    )
    covered = [key for key in covered if not key.startswith("_")]
    return AttributeError(f"{kind.__name__}.{name} is not covered by minisd.diffusers, which has {', '.join(covered)}")


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:80]}..."
