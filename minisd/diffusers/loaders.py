"""LoRAs and textual inversions under diffusers' calls: names and arguments -> `minisd.adapters`.

A LoRA is known by its adapter name. Those that are active stand beside the layers with their weights, until they are
fused (added to the weights) or unloaded.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minisd.adapters.loading import Adapters
from minisd.adapters.lora import Loaded, LoRA, attach, open_lora
from minisd.checkpoint.save import into_place, write_tensors
from minisd.diffusers.loading import NEUTRAL, Source, folder_of_texts
from minisd.diffusers.refusing import NotCoveredError, accept, parameters, shortened
from minisd.files import CheckpointError

LORA_NAME = "pytorch_lora_weights.safetensors"
EMBEDDING_NAME = "learned_embeds.safetensors"


@dataclass
class Adapter:
    """A LoRA that a pipeline has. `scratch`: the folder of its file, read again when its weight changes."""

    lora: LoRA
    scratch: tempfile.TemporaryDirectory[str]
    weight: float = 1.0
    active: bool = True
    enabled: bool = True  # "disable_lora" leaves out all that are active
    fused: float | None = None  # the strength with which it is in the weights now
    beside: Loaded | None = None


class StableDiffusionLoraLoaderMixin:
    """LoRA calls of a pipeline."""

    unet: Any
    text_encoder: Any

    @property
    def _adapters(self) -> dict[str, Adapter]:
        """They belong to the UNet, as in diffusers: pipelines that share it share them."""
        adapters: dict[str, Adapter] = self.unet.__dict__.setdefault("adapters_by_name", {})
        return adapters

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Source | Mapping[str, Tensor],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **others: Any,
    ) -> None:
        """Add a LoRA from a file, a folder (or hub repository) with `weight_name` in it, or a state dict.

        It is then the active one, alone, with weight 1, until `set_adapters` says otherwise. Raises CheckpointError for
        one that does not fit, ValueError for an `adapter_name` that is taken.
        """
        call = f"{type(self).__name__}.load_lora_weights"
        neutral = {**NEUTRAL, "hotswap": (False,), "prefix": ("unet",)}
        accept(call, others, neutral, parameters(StableDiffusionLoraLoaderMixin.load_lora_weights))
        name = adapter_name or f"default_{len(self._adapters)}"
        if name in self._adapters:
            raise ValueError(f"adapter_name={name!r}: is in use; the adapters are {', '.join(self._adapters)}")
        source, scratch = pretrained_model_name_or_path_or_dict, tempfile.TemporaryDirectory()
        if isinstance(source, Mapping):
            path = Path(scratch.name, "lora.safetensors")
            save_file(packed(source), path)
        else:
            path = kept(file_in(source, weight_name, subfolder, LORA_NAME), Path(scratch.name))
        adapter = Adapter(open_lora(path, self._core().config), scratch)  # type: ignore[attr-defined]
        self._stand_beside(adapter, 1.0)
        for other in self._adapters.values():
            other.active = False
            self._stand_beside(other, 1.0)
        self._adapters[name] = adapter
        self.unet.__dict__["lora_scaler"] = self._scale_loras

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: Source,
        unet_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | None = None,
        weight_name: str | None = None,
        **others: Any,
    ) -> None:
        """Write state dicts of trained LoRA layers (peft's `get_peft_model_state_dict`) into one file of a folder."""
        neutral = {"safe_serialization": (True,), "is_main_process": (True,)}
        accept(f"{cls.__name__}.save_lora_weights", others, neutral, parameters(cls.save_lora_weights))
        parts = {"unet": unet_lora_layers or {}, "text_encoder": text_encoder_lora_layers or {}}
        state = {f"{part}.{name}": one for part, layers in parts.items() for name, one in layers.items()}
        if not state:
            raise ValueError("save_lora_weights: needs unet_lora_layers or text_encoder_lora_layers")
        folder = Path(os.path.expanduser(save_directory))
        folder.mkdir(parents=True, exist_ok=True)
        into_place(folder / (weight_name or LORA_NAME), lambda path: write_tensors(path, packed(state), {}))

    def _stand_beside(self, adapter: Adapter, scale: float) -> None:
        """Put an adapter beside its layers at `scale` times its weight, where it was before or not."""
        if adapter.beside is not None:
            adapter.beside.remove()
            adapter.beside = None
        if adapter.active and adapter.enabled and adapter.fused is None:
            modules = {name: part.core for name, part in self._lora_parts().items()}
            adapter.beside = attach(adapter.lora, modules, adapter.weight * scale)

    def _lora_parts(self) -> dict[str, Any]:
        parts = {"unet": self.unet, "text_encoder": self.text_encoder}
        return {name: part for name, part in parts.items() if part is not None}

    def _scale_loras(self, scale: float) -> None:
        """`cross_attention_kwargs={"scale": scale}`: all that stand beside, for the call that follows."""
        for adapter in self._adapters.values():
            if adapter.beside is not None and adapter.beside.scale != adapter.weight * scale:
                self._stand_beside(adapter, scale)

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: float | list[float] | None = None) -> None:
        """Make these the active LoRAs, with weight 1 or the weights given. Raises ValueError for unknown names."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights: {len(weights)} for {len(names)} adapters")
        for weight in weights:
            if weight is not None and not isinstance(weight, int | float):
                raise NotCoveredError(
                    f"set_adapters: a weight of {shortened(weight)} is not covered: one number each is"
                )
        self._known(names)
        chosen = {name: 1.0 if weight is None else float(weight) for name, weight in zip(names, weights, strict=True)}
        for name, adapter in self._adapters.items():
            adapter.active, adapter.enabled = name in chosen, True
            adapter.weight = chosen.get(name, 1.0)
            self._stand_beside(adapter, 1.0)

    def _known(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._adapters:
                raise ValueError(f"{name!r}: no such adapter; there are {', '.join(self._adapters) or 'none'}")

    def get_active_adapters(self) -> list[str]:
        return [name for name, adapter in self._adapters.items() if adapter.active]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The adapters of each network, by the network's name."""
        found: dict[str, list[str]] = {}
        for name, adapter in self._adapters.items():
            for part in dict.fromkeys(component for component, _ in adapter.lora.changes):
                found.setdefault(part, []).append(name)
        return found

    def disable_lora(self) -> None:
        """Leave out all LoRAs until `enable_lora`."""
        for adapter in self._adapters.values():
            adapter.enabled = False
            self._stand_beside(adapter, 1.0)

    def enable_lora(self) -> None:
        for adapter in self._adapters.values():
            adapter.enabled = True
            self._stand_beside(adapter, 1.0)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **others: Any,
    ) -> None:
        """Add the active LoRAs (or those named), `lora_scale` times, to the weights of both networks."""
        neutral = {"fuse_unet": (True,), "fuse_text_encoder": (True,), "components": (None, ["unet", "text_encoder"])}
        accept(
            "fuse_lora",
            {"components": components, **others},
            neutral,
            parameters(StableDiffusionLoraLoaderMixin.fuse_lora),
        )
        self._known(adapter_names or ())
        for name, adapter in self._adapters.items():
            chosen = adapter.active if adapter_names is None else name in adapter_names
            if chosen and adapter.fused is None:
                adapter.fused = adapter.weight * lora_scale
                self._stand_beside(adapter, 1.0)
                self._add_to_weights(adapter.lora, adapter.fused, safe=safe_fusing)

    def unfuse_lora(self, components: list[str] | None = None, **others: Any) -> None:
        """Subtract what `fuse_lora` added; the weights come back within rounding.

        The LoRA then stands beside its layers at the strength at which it was fused, as in diffusers.
        """
        neutral = {
            "unfuse_unet": (True,),
            "unfuse_text_encoder": (True,),
            "components": (None, ["unet", "text_encoder"]),
        }
        accept(
            "unfuse_lora",
            {"components": components, **others},
            neutral,
            parameters(StableDiffusionLoraLoaderMixin.unfuse_lora),
        )
        for adapter in self._adapters.values():
            if adapter.fused is not None:
                self._add_to_weights(adapter.lora, adapter.fused, sign=-1)
                adapter.weight, adapter.fused = adapter.fused, None
                self._stand_beside(adapter, 1.0)

    @torch.no_grad()
    def _add_to_weights(self, lora: LoRA, scale: float, *, sign: int = 1, safe: bool = False) -> None:
        parts = {name: part.core for name, part in self._lora_parts().items()}
        for (component, name), change in lora.changes.items():
            weight = parts[component].get_parameter(name)
            delta = change.path().product().to(weight) * change.scaling(scale)
            if safe and not delta.isfinite().all():
                raise ValueError(f"{name}: fusing would make it infinite or NaN")
            weight.add_(delta.reshape(weight.shape), alpha=sign)

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)

    @property
    def fused_loras(self) -> set[str]:
        return {name for name, adapter in self._adapters.items() if adapter.fused is not None}

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Forget these LoRAs. What was fused stays in the weights. Raises ValueError for unknown names."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._known(names)
        for name in names:
            adapter = self._adapters.pop(name)
            adapter.active = False
            self._stand_beside(adapter, 1.0)

    def unload_lora_weights(self) -> None:
        """Forget all LoRAs. What was fused stays in the weights."""
        self.delete_adapters(list(self._adapters))


class TextualInversionLoaderMixin:
    """Textual inversion calls of a pipeline."""

    tokenizer: Any
    text_encoder: Any

    @property
    def _inversions(self) -> Adapters:
        """They belong to the tokenizer: pipelines that share it share them."""
        loaded: Adapters = self.tokenizer.__dict__.setdefault("inversions", Adapters(Parts(self)))
        return loaded

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **others: Any,
    ) -> None:
        """Add the tokens of a textual inversion: a file, a folder with `weight_name` in it, a dict or a tensor.

        Several, with as many tokens, may be given in lists. Raises ValueError for a token that the vocabulary has, and
        CheckpointError for what is no embedding of this model.
        """
        call = f"{type(self).__name__}.load_textual_inversion"
        given = {"tokenizer": tokenizer, "text_encoder": text_encoder, **others}
        neutral = {"tokenizer": (None, self.tokenizer), "text_encoder": (None, self.text_encoder), **NEUTRAL}
        accept(call, given, neutral, parameters(TextualInversionLoaderMixin.load_textual_inversion))
        sources = pretrained_model_name_or_path
        several = sources if isinstance(sources, list) else [sources]
        tokens = token if isinstance(token, list) else [token] * len(several)
        if len(tokens) != len(several):
            raise ValueError(f"token: {len(tokens)} for {len(several)} embeddings")
        for source, name in zip(several, tokens, strict=True):
            self._load_embedding(source, name, weight_name, subfolder)

    def _load_embedding(self, source: Any, token: str | None, weight_name: str | None, subfolder: str | None) -> None:
        if isinstance(source, Mapping):  # {"<cat>": vectors}, or the form of the original training code
            found = source.get("string_to_param", source)
            own = source.get("name") if "string_to_param" in source else next(iter(found))
            vectors = next(iter(found.values()))
            self._inversions.load_embedding(vectors, token or own)
        elif isinstance(source, Tensor):
            self._inversions.load_embedding(source, token)
        else:
            self._inversions.load_embedding(file_in(source, weight_name, subfolder, EMBEDDING_NAME), token)

    def unload_textual_inversion(
        self, tokens: str | list[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Remove added tokens, or all. Raises ValueError for one that is not loaded."""
        given = {"tokenizer": tokenizer, "text_encoder": text_encoder}
        neutral = {"tokenizer": (None, self.tokenizer), "text_encoder": (None, self.text_encoder)}
        accept(f"{type(self).__name__}.unload_textual_inversion", given, neutral, ["tokens"])
        for token in [tokens] if tokens is None or isinstance(tokens, str) else tokens:
            self._inversions.unload_embedding(token)


class Parts:
    """A pipeline's tokenizer and text encoder as `minisd.adapters` has a model's."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def text_encoder(self) -> Any:
        return self.pipeline.text_encoder.core

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer.core

    @tokenizer.setter
    def tokenizer(self, core: Any) -> None:
        self.pipeline.tokenizer.hold(core)

    @property
    def config(self) -> Any:
        return SimpleNamespace(text_encoder=self.text_encoder.config)


def file_in(source: Source, weight_name: str | None, subfolder: str | None, usual: str) -> Path:
    """A file that was named itself, or by the folder or repository that it is in and perhaps its own name."""
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return path
    folder = path / (subfolder or "") if path.is_dir() else folder_of_texts(source, subfolder)
    names = sorted(one.name for one in folder.glob("*.safetensors"))
    chosen = weight_name or (usual if usual in names or len(names) != 1 else names[0])
    if not (folder / chosen).is_file():
        raise CheckpointError(f"{folder}: has no {chosen}; give weight_name, one of {', '.join(names) or 'nothing'}")
    return folder / chosen


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as files want them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def kept(path: Path, folder: Path) -> Path:
    """The same file in `folder`: a program may remove its own. PEFT's settings, if they stand beside it, come too."""
    for one in (path, path.with_name("adapter_config.json")):
        if one.is_file():
            try:
                os.link(one, folder / one.name)
            except OSError:  # another disk, or a system without links
                shutil.copyfile(one, folder / one.name)
    return folder / path.name
