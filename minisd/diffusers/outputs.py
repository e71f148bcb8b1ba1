"""What calls return and settings look like in diffusers: mappings whose entries are attributes too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from typing import Self


class Config(dict[str, Any]):
    """A part's settings under diffusers' names, read-only: `config.in_channels`, `config["in_channels"]`."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"config.{name} is not covered by minisd.diffusers, which has {', '.join(self)}")

    def _read_only(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("config is read-only: a network's settings belong to its weights")

    __setattr__ = __delattr__ = __setitem__ = __delitem__ = __ior__ = _read_only
    update = pop = popitem = clear = setdefault = _read_only

    def __reduce__(self) -> tuple[Any, ...]:
        return Config, (dict(self),)


class Output(dict[str, Any]):
    """What a call returns: `output.sample`, `output["sample"]` or `output[0]`, as in diffusers and transformers."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"this output has no {name!r}; it has {', '.join(self)}")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())

    def to(self, device: str | torch.device) -> Self:
        """The same, its tensors on `device`: `tokenizer(...).to(device)`."""
        return type(self)({name: value.to(device) for name, value in self.items()})


def output(return_dict: bool | None, **values: Any) -> Any:
    """An `Output`, or a plain tuple for `return_dict=False`."""
    return tuple(values.values()) if return_dict is False else Output(values)
