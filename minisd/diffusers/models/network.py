"""What diffusers' networks have in common: loading, saving, settings, and minisd's network beneath them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from minisd.checkpoint import configs
from minisd.checkpoint.keymap import KEYS, Key
from minisd.checkpoint.load import build
from minisd.checkpoint.survey import Part
from minisd.diffusers.loading import NEUTRAL, Source, check_variant, chosen_dtype, open_part
from minisd.diffusers.outputs import Config
from minisd.diffusers.refusing import NotCoveredError, accept, missing, parameters, shortened
from minisd.diffusers.saving import save_network

if TYPE_CHECKING:
    from typing import Self


class SavesMemory:
    """Calls that save memory in diffusers, where they round otherwise. torch's attention saves it anyway: no effect."""

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None: ...
    def disable_attention_slicing(self) -> None: ...
    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None: ...
    def disable_xformers_memory_efficient_attention(self) -> None: ...


class Format(NamedTuple):
    """How a kind of network stands in files: config.json's fields that minisd does at one value only, that file read
    and written, and the names of the weights.
    """

    neutral: Mapping[str, Any]
    read: Callable[[Mapping[str, Any], str, list[str]], Any]
    write: Callable[[Any], dict[str, Any]]
    keys: Callable[[Any], Iterator[Key]]

    @classmethod
    def of(cls, component: str) -> Format:
        """Of a component of Stable Diffusion."""
        neutral = getattr(configs, component.upper().removesuffix("_2")).neutral
        return cls(neutral, configs.READERS[component], configs.WRITERS[component], KEYS[component])


class Network(nn.Module, SavesMemory):
    """A network in diffusers' tree, grown from one of minisd's: the same layers, under diffusers' names."""

    component: ClassVar[str]
    kind: ClassVar[type[nn.Module]]
    format: ClassVar[Format]
    default_dtype: ClassVar[torch.dtype | None] = torch.float32
    config: Config

    def __init__(self, *others: Any, **settings: Any) -> None:
        """A new network from diffusers' numbers (`block_out_channels=...`), initialised as torch does.

        A seed gives the weights that it gives in diffusers. Raises CheckpointError for numbers that are impossible and
        NotCoveredError for those that minisd does not do.
        """
        super().__init__()
        if others:
            raise NotCoveredError(f"{type(self).__name__}: takes settings by name only, not {shortened(others[0])}")
        notes: list[str] = []
        stated = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        if isinstance(stated.get("sample_size"), list):  # height and width: no layer depends on them
            stated["sample_size"] = stated["sample_size"][0]
        try:
            config = self.format.read(stated, type(self).__name__, notes)
        except ValueError as error:
            raise NotCoveredError(f"{error} (minisd.diffusers)") from None
        if notes:
            raise NotCoveredError(f"{notes[0].replace('ignored', 'has no')} (minisd.diffusers)")
        with torch.device("meta"):
            core = self.kind(config)
        self._hold(core.to_empty(device="cpu"))
        self.config = Config({**self.config, **settings})
        for layer in self.leaves_as_made():
            layer.reset_parameters()

    @classmethod
    def of(cls, core: Any) -> Self:
        """minisd's network in this tree: the layers are shared."""
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network._hold(core)
        network.train(core.training)
        return network

    def _hold(self, core: Any) -> None:
        self.__dict__["_core"] = core  # no submodule: its layers are in the tree, and would be listed twice
        self.config = Config({**self.format.neutral, **self.format.write(core.config)})
        self.grow(core)

    def grow(self, core: Any) -> None:
        """Register the submodules."""
        raise NotImplementedError

    def leaves_as_made(self) -> list[Any]:
        """The layers with weights, in the order in which diffusers makes them: each draws its initial values then."""
        raise NotImplementedError

    @property
    def core(self) -> Any:
        """minisd's network, with the layers that are in the tree now."""
        core = self.__dict__["_core"]
        for ours, theirs in self.paths(core.config).items():
            owner, _, name = ours.rpartition(".")
            setattr(core.get_submodule(owner), name, self.get_submodule(theirs))
        return core

    @classmethod
    def paths(cls, config: Any) -> dict[str, str]:
        """minisd's name of every layer -> its path in diffusers' tree."""
        names = ((key.minisd, key.diffusers) for key in cls.format.keys(config))
        return {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in names}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Source,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        variant: str | None = None,
        **others: Any,
    ) -> Self:
        """The network in a folder or hub repository, or in its `subfolder`, in evaluation mode.

        `torch_dtype` (or `dtype`): float32 unless given, but for a CLIPTextModel the file's, as for "auto". `variant`:
        "fp16", "non_ema". Raises NotCoveredError for other arguments, CheckpointError for files that cannot be used.
        """
        call = f"{cls.__name__}.from_pretrained"
        accept(call, others, NEUTRAL, parameters(cls.from_pretrained))
        check_variant(call, variant)
        number = chosen_dtype(call, dtype, torch_dtype, cls.default_dtype)
        return cls.of(cls.load_core(pretrained_model_name_or_path, subfolder, variant, number))

    @classmethod
    def load_core(cls, source: Source, subfolder: str | None, variant: str | None, dtype: torch.dtype | None) -> Any:
        """minisd's network out of the files."""
        return build(cls.kind, cls.open_part(source, subfolder, variant), dtype, torch.device("cpu"))

    @classmethod
    def open_part(cls, source: Source, subfolder: str | None, variant: str | None) -> Part:
        """The network's folder, understood but not yet read."""
        return open_part(source, cls.component, subfolder, variant)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """A new network with the settings of another's `config`."""
        return cls(**{name: value for name, value in {**config, **overrides}.items() if not name.startswith("_")})

    def register_to_config(self, **settings: Any) -> None:
        """Change what `config` says and `save_pretrained` writes, after a layer was replaced by a program's own."""
        self.config = Config({**self.config, **settings})

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        **others: Any,
    ) -> None:
        """Write config.json and the weights into a folder, as diffusers does. `variant`: a part of the file's name."""
        call = f"{type(self).__name__}.save_pretrained"
        neutral = {"push_to_hub": (False,), "is_main_process": (True,), "max_shard_size": ("10GB", "5GB")}
        given = {"safe_serialization": safe_serialization, **others}
        accept(call, given, neutral | {"safe_serialization": (True,)}, parameters(type(self).save_pretrained))
        save_network(Path(os.path.expanduser(save_directory)), self, self.saved_state(), variant)

    def saved_state(self) -> Mapping[str, Tensor]:
        """The weights under the names that files have."""
        return self.state_dict()

    def scale_loras(self, scale: float) -> None:
        """Give the LoRAs that a pipeline has put beside the layers this strength. Without any it means nothing."""
        scaler = self.__dict__.get("lora_scaler")
        if scaler is not None:
            scaler(scale)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Put trainable low-rank layers of the peft library into the tree, as its `LoraConfig` says. Needs peft."""
        from peft import inject_adapter_in_model

        inject_adapter_in_model(adapter_config, self, adapter_name)

    def num_parameters(self, only_trainable: bool = False) -> int:
        return sum(one.numel() for one in self.parameters() if one.requires_grad or not only_trainable)

    def enable_gradient_checkpointing(self) -> None:
        """No effect: it saves memory in training, and changes no gradient."""

    def disable_gradient_checkpointing(self) -> None:
        """No effect."""

    @property
    def is_gradient_checkpointing(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        """Submodules and weights; then settings (older programs say `unet.in_channels`); then a clear no."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            settings = self.__dict__.get("config", {})
            if name in settings:
                return settings[name]
            raise missing(self, name) from None
