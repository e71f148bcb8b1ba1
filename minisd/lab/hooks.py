"""One listener for everything that observes a model from outside: taps, the NaN tracer, the parity lab.

    with Listener() as listener:
        listener.after(sd.unet, lambda args, kwargs, output: print(output.shape))
        sd.text_to_image("red heart", seed=1)

In: modules, methods and the functions to call. Out: their calls, while the context lasts. Every hook and every replaced
method is taken off at its end, after an exception too.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

Before = Callable[[Any, Any], Any]  # (args, kwargs) -> None, or (args, kwargs) in their place
After = Callable[[Any, Any, Any], Any]  # (args, kwargs, output) -> None, or another output


class Listener(ExitStack):
    """A context in which modules and methods are observed."""

    def before(self, module: nn.Module, hear: Before, *, first: bool = False) -> None:
        """Call `hear` before each call of `module`; `first`: before all hooks that are there already."""

        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return hear(args, kwargs)

        self.callback(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first).remove)

    def after(self, module: nn.Module, hear: After, *, always: bool = False) -> None:
        """Call `hear` after each call of `module`; `always`: after one that raised, too."""

        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return hear(args, kwargs, output)

        self.callback(module.register_forward_hook(hook, with_kwargs=True, always_call=always).remove)

    def around(self, owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
        """Replace one object's method by `wrapper(method)`; its signature stays, which pipelines look at."""
        self.callback(wrap(owner, name, wrapper))


WRAPPED = "_wrapped_by_listeners"


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> Callable[[], None]:
    """Put a wrapper around an object's method; returns what takes it off again, in whichever order wrappers go.

    The object's own list of wrappers says what is still on: the method is built anew from it each time.
    """
    lists = vars(owner).setdefault(WRAPPED, {})
    if name not in lists:
        lists[name] = (name in vars(owner), getattr(owner, name), [])
    own, original, wrappers = lists[name]
    wrappers.append(wrapper)

    def build() -> None:
        method = original
        for around in wrappers:
            method = functools.wraps(original)(around(method))
        setattr(owner, name, method)

    def take_off() -> None:
        wrappers.remove(wrapper)
        build()
        if wrappers:
            return
        if not own:
            delattr(owner, name)
        del lists[name]
        if not lists:
            delattr(owner, WRAPPED)

    build()
    return take_off


@contextmanager
def silenced(module: nn.Module | None) -> Iterator[None]:
    """A module without its hooks for a moment, so that a second call of it is not observed."""
    hooks = {} if module is None else module._forward_hooks.copy()
    try:
        if module is not None:
            module._forward_hooks.clear()
        yield
    finally:
        if module is not None:
            module._forward_hooks.update(hooks)
