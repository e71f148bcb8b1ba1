"""A pipeline as a thing: made of parts, read from files, written to files, moved between devices.

What a pipeline does with a prompt is in `pipelines.py`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tqdm import tqdm

from minisd.checkpoint.load import Checkpoint, build, open_checkpoint, read_tokenizer, usable_device
from minisd.diffusers.image_processor import VaeImageProcessor
from minisd.diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from minisd.diffusers.loading import NEUTRAL, Source, check_is_variant, check_variant, chosen_dtypes
from minisd.diffusers.models import AutoencoderKL, UNet2DConditionModel
from minisd.diffusers.models.network import Network, SavesMemory
from minisd.diffusers.outputs import Config
from minisd.diffusers.refusing import NotCoveredError, accept, missing, parameters
from minisd.diffusers.saving import pipeline_index, save_pipeline
from minisd.diffusers.scheduling import correct, folder_scheduler, make_scheduler
from minisd.diffusers.text_encoder import CLIPTextModel
from minisd.diffusers.tokenizer import CLIPTokenizer
from minisd.files import read_json_object
from minisd.pipeline import StableDiffusion

if TYPE_CHECKING:
    from typing import Self

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
ABSENT = ("safety_checker", "feature_extractor", "image_encoder")  # diffusers has them; here they are None
NETWORKS: dict[str, type[Network]] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
}
NO_EXTRAS: dict[str, tuple[Any, ...]] = {**dict.fromkeys(ABSENT, (None,)), "requires_safety_checker": (True, False)}


class Parts(SavesMemory):
    """A pipeline of named parts, on one device. Base of all pipelines."""

    _parts: ClassVar[tuple[str, ...]]
    _absent: ClassVar[tuple[str, ...]] = ()  # parts that diffusers' pipelines may have besides
    _progress_bar_config: dict[str, Any]

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name, and None for what diffusers' pipelines may have besides."""
        return {name: getattr(self, name) for name in (*self._parts, *self._absent)}

    def register_modules(self, **parts: Any) -> None:
        """Replace parts by name."""
        for name, part in parts.items():
            if name not in (*self._parts, *self._absent):
                raise NotCoveredError(f"register_modules: {name} is not covered, which takes {', '.join(self._parts)}")
            setattr(self, name, part)

    def save_pretrained(
        self,
        save_directory: Source,
        safe_serialization: bool = True,
        variant: str | None = None,
        **others: Any,
    ) -> None:
        """Write a folder that diffusers loads too, with a folder for each part. `variant`: "fp16", in file names.

        Raises FileExistsError where something else is in the way.
        """
        call = f"{type(self).__name__}.save_pretrained"
        neutral = {"safe_serialization": (True,), "push_to_hub": (False,), "max_shard_size": (None, "10GB")}
        given = {"safe_serialization": safe_serialization, **others}
        accept(call, given, neutral, parameters(Parts.save_pretrained))
        save_pipeline(Path(os.path.expanduser(save_directory)), self, variant)

    @property
    def config(self) -> Config:
        """Which classes the parts have, as model_index.json says it."""
        return Config(pipeline_index(self))

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the networks to a device, a dtype, or both, as `torch.nn.Module.to`; returns the pipeline."""
        dtype = kwargs.pop("torch_dtype", None)
        networks: list[Any] = [part for part in self.components.values() if isinstance(part, torch.nn.Module)]
        for network in networks:
            network.to(*args, **kwargs, **({} if dtype is None else {"dtype": dtype}))
        return self

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    _execution_device = device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.unet.dtype
        return dtype

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device = "cuda") -> None:
        """Move the networks to the accelerator, where diffusers would run them one by one; here they stay there."""
        self.to(usable_device(device if gpu_id is None else f"{torch.device(device).type}:{gpu_id}"))

    enable_sequential_cpu_offload = enable_model_cpu_offload

    def maybe_free_model_hooks(self) -> None:
        """No effect: offloading is moving here."""

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> Any:
        """A tqdm bar, with what `set_progress_bar_config` said."""
        return tqdm(iterable, total=total, **self._progress_bar_config)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """tqdm's arguments: `disable=True`, `leave=False`, ..."""
        self._progress_bar_config = kwargs

    def __getattr__(self, name: str) -> Any:
        raise missing(self, name)


class Assembly(Parts, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin):
    """The parts of Stable Diffusion, together. Base of the three pipelines."""

    # diffusers corrects these settings of any scheduler that a pipeline is made with (not of one assigned later).
    _corrections: ClassVar[dict[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    _optional_components: ClassVar[tuple[str, ...]] = ABSENT
    _parts: ClassVar[tuple[str, ...]] = PARTS
    _absent: ClassVar[tuple[str, ...]] = ABSENT
    _paddings: ClassVar[dict[str, str | None]] = {"tokenizer": None}  # tokenizer -> its padding, None: the model's own
    _usual_scheduler = "PNDMScheduler"  # of a single file that does not say
    _networks: ClassVar[dict[str, type[Network]]] = NETWORKS

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        **extras: Any,
    ) -> None:
        """From its parts, of which some may be None. Raises NotCoveredError for a safety checker."""
        call = type(self).__name__
        accept(call, extras, NO_EXTRAS, parameters(self.__init__))  # type: ignore[misc]
        self.vae, self.text_encoder, self.tokenizer = vae, text_encoder, tokenizer
        self.unet, self.scheduler = unet, scheduler
        self.feature_extractor = self.image_encoder = None
        correct(scheduler, self._corrections)
        self.vae_scale_factor = 8 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._progress_bar_config = {}

    # ------------------------------------------------ files

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Source,
        torch_dtype: Any = None,
        dtype: Any = None,
        variant: str | None = None,
        **others: Any,
    ) -> Self:
        """The pipeline in a folder or hub repository (or "emoji", minisd's small model), float32 unless asked.

        `variant`: "fp16", "non_ema". `vae`, `unet`, `text_encoder`, `tokenizer`, `scheduler` replace the folder's.
        Raises NotCoveredError for other arguments, CheckpointError for files that cannot be used.
        """
        call = f"{cls.__name__}.from_pretrained"
        given = {name: others.pop(name) for name in cls._parts if name in others}
        accept(call, others, NEUTRAL | NO_EXTRAS, [*parameters(cls.from_pretrained), *cls._parts])
        check_variant(call, variant)
        dtypes = chosen_dtypes(call, dtype, torch_dtype)
        wants_half = "fp16" in (variant, others.get("revision"))
        half = torch.float16 if wants_half else torch.float32
        weights = "raw" if variant == "non_ema" else "auto"
        checkpoint = open_checkpoint(pretrained_model_name_or_path, dtype=half, weights=weights)
        if not checkpoint.path.is_dir():
            raise NotCoveredError(f"{call}: {checkpoint.path} is one file: use from_single_file")
        for component in checkpoint.components.values():
            check_is_variant(component.files, variant)
        if "safety_checker" not in others:
            note_safety_checker(checkpoint.path)
        parts = {"scheduler": folder_scheduler(checkpoint.path), **cls._loaded(checkpoint, dtypes, given)}
        return cls(**{**parts, **given})

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: Source,
        torch_dtype: Any = None,
        dtype: Any = None,
        config: Source | None = None,
        **others: Any,
    ) -> Self:
        """The pipeline in one `.safetensors` file; `config` is a folder whose scheduler and tokenizer to take.

        Without it, a file that minisd did not save stands for SD 1.5, whose scheduler is PNDM: assign another one.
        """
        call = f"{cls.__name__}.from_single_file"
        given = {name: others.pop(name) for name in cls._parts if name in others}
        neutral = {"original_config": (None,), "original_config_file": (None,), "load_safety_checker": (None, False)}
        accept(call, others, NEUTRAL | NO_EXTRAS | neutral, [*parameters(cls.from_single_file), *cls._parts])
        dtypes = chosen_dtypes(call, dtype, torch_dtype)
        if "://" in os.fspath(pretrained_model_link_or_path):
            raise NotCoveredError(f"{call}: addresses are not covered by minisd.diffusers: give a file on this machine")
        checkpoint = open_checkpoint(pretrained_model_link_or_path, dtype=torch.float32)
        if config is None:
            ours = "minisd.config" in checkpoint.components["unet"].files.metadata
            scheduler = make_scheduler("DDIMScheduler" if ours else cls._usual_scheduler, checkpoint.scheduler)
        else:
            scheduler = folder_scheduler(Path(os.path.expanduser(config)))
            given.setdefault("tokenizer", CLIPTokenizer.from_pretrained(config, subfolder="tokenizer"))
        return cls(**{"scheduler": scheduler, **cls._loaded(checkpoint, dtypes, given), **given})

    @classmethod
    def _loaded(
        cls, checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype | None], given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The networks and the tokenizer of a checkpoint, but for those `given`."""
        if absent := [name for name in cls._networks if name not in checkpoint.components]:
            raise NotCoveredError(f"{cls.__name__}: {checkpoint.path} has no {absent[0]}")
        if other := [name for name in checkpoint.components if name not in cls._networks]:
            raise NotCoveredError(f"{cls.__name__}: {checkpoint.path} has a {other[0]}: use StableDiffusionXLPipeline")
        for note in checkpoint.notes:
            warnings.warn(note, stacklevel=4)
        parts: dict[str, Any] = {
            name: kind.of(build(kind.kind, checkpoint.components[name], dtypes[name], torch.device("cpu")))
            for name, kind in cls._networks.items()
            if name not in given
        }
        if wanted := {name: padding for name, padding in cls._paddings.items() if name not in given}:
            words = read_tokenizer(checkpoint)
            for name, padding in wanted.items():
                parts[name] = CLIPTokenizer(words.padded_with(padding) if padding else words)
        return {**parts, **cls._settings(checkpoint)}

    @classmethod
    def _settings(cls, checkpoint: Checkpoint) -> dict[str, Any]:
        """What a pipeline is told besides its parts."""
        return {}

    @classmethod
    def from_pipe(cls, pipeline: Assembly, **parts: Any) -> Self:
        """This pipeline with another's parts, which are shared, not copied; `parts` replace some."""
        return cls(**{**pipeline.components, **parts})

    # ------------------------------------------------ parts

    def _core(self) -> StableDiffusion:
        """minisd's pipeline of these parts: the loop and the tasks run on it, and need no part that is None here."""
        text_encoder: Any = None if self.text_encoder is None else self.text_encoder.core
        vae: Any = NoVAE(self.vae_scale_factor, self.unet.config.out_channels) if self.vae is None else self.vae.core
        tokenizer: Any = None if self.tokenizer is None else self.tokenizer.core
        return StableDiffusion(text_encoder, self.unet.core, vae, tokenizer, scheduler=self.scheduler.config)

    @property
    def safety_checker(self) -> None:
        return None

    @safety_checker.setter
    def safety_checker(self, value: Any) -> None:
        accept(type(self).__name__, {"safety_checker": value}, NO_EXTRAS, [])

    def enable_vae_slicing(self) -> None:
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()


class NoVAE:
    """What the sampling loop asks of a VAE, where a pipeline has none: how much smaller latents are."""

    def __init__(self, downsampling: int, latent_channels: int) -> None:
        self.config = SimpleNamespace(downsampling=downsampling, latent_channels=latent_channels)


def note_safety_checker(folder: Path) -> None:
    """Lest anybody thinks that pictures are checked here."""
    index = folder / "model_index.json"
    entry = read_json_object(index).get("safety_checker") if index.exists() else None
    if isinstance(entry, list) and any(entry):
        warnings.warn(f"{folder}: its safety checker is not covered by minisd.diffusers and not used", stacklevel=3)
