"""The parts of Stable Diffusion under diffusers' names and with diffusers' calls.

Each class holds one of minisd's modules and translates: arguments on the way in, `.sample` and its like on the way
out. What is computed, minisd computes. Next: `text.py`, the same for transformers' two classes; then `pipelines.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from minisd import schedulers, vae
from minisd.checkpoint import configs
from minisd.checkpoint.load import build
from minisd.diffusers.loading import NEUTRAL, Source, check_variant, chosen_dtype, folder_of_texts, open_part
from minisd.diffusers.refusing import NotCoveredError, accept, missing, parameters
from minisd.unet import UNet
from minisd.vae import VAE

if TYPE_CHECKING:
    from typing import Self


class Config(dict[str, Any]):
    """A network's settings under diffusers' names, read-only: `config.in_channels`, `config["in_channels"]`."""

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


class SavesMemory:
    """Calls that save memory in diffusers, where they round otherwise. torch's attention saves it anyway: no effect."""

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None: ...
    def disable_attention_slicing(self) -> None: ...
    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None: ...
    def disable_xformers_memory_efficient_attention(self) -> None: ...


class Network(nn.Module, SavesMemory):
    """One of minisd's networks, `core`, and what diffusers' networks have in common."""

    core: Any
    component: ClassVar[str]
    kind: ClassVar[type[nn.Module]]
    default_dtype: ClassVar[torch.dtype | None] = torch.float32

    def __init__(self, core: Any = None, **settings: Any) -> None:
        super().__init__()
        if settings or not isinstance(core, self.kind):
            what = ", ".join(settings) or repr(type(core).__name__)
            raise NotCoveredError(
                f"{type(self).__name__}({what}) is not covered by minisd.diffusers: networks come from from_pretrained"
            )
        self.hold(core)
        self.train(core.training)
        table: configs.Fields = getattr(configs, self.component.upper())
        self.config = Config(table.neutral | configs.WRITERS[self.component](core.config))

    def hold(self, core: Any) -> None:
        self.core = core

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Source,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        **others: Any,
    ) -> Self:
        """The network in a folder or hub repository, or in its `subfolder`, in evaluation mode.

        `torch_dtype` (or `dtype`): float32 unless given, but for a CLIPTextModel the file's. `variant`: "fp16",
        "non_ema". Raises NotCoveredError for other arguments, CheckpointError for files that cannot be used.
        """
        call = f"{cls.__name__}.from_pretrained"
        accept(call, others, NEUTRAL, parameters(cls.from_pretrained))
        check_variant(call, variant)
        number = chosen_dtype(call, dtype, torch_dtype, cls.default_dtype)
        part = open_part(pretrained_model_name_or_path, cls.component, subfolder, variant)
        return cls(build(cls.kind, part, number, torch.device("cpu")))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def __getattr__(self, name: str) -> Any:
        """Submodules and weights; then settings (older programs say `unet.in_channels`); then a clear no."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            settings = self.__dict__.get("config", {})
            if name in settings:
                return settings[name]
            raise missing(self, name) from None


class UNet2DConditionModel(Network):
    """`minisd.unet.UNet`."""

    component, kind = "unet", UNet
    core: UNet

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("class_labels", "timestep_cond", "attention_mask", "encoder_attention_mask"), (None,)),
        **dict.fromkeys(("down_block_additional_residuals", "mid_block_additional_residual"), (None,)),
        **dict.fromkeys(("cross_attention_kwargs", "added_cond_kwargs"), (None, {})),
        "down_intrablock_additional_residuals": (None,),
    }

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Predict noise: `sample` (B, C, H, W), `timestep` one or (B,), text (B, T, D) -> `.sample` (B, 4, H, W)."""
        if not isinstance(return_dict, bool):  # in fourth place diffusers has class_labels
            raise NotCoveredError(f"UNet2DConditionModel: takes three arguments by position, not {return_dict!r} too")
        accept("UNet2DConditionModel", others, self.NEUTRAL, parameters(self.forward))
        eps = self.core(sample, torch.as_tensor(timestep), encoder_hidden_states)
        return output(return_dict, sample=eps)


class DiagonalGaussian(vae.Gaussian):
    """`latent_dist`: `mean`, `logvar`, `std`, `var`, `sample(generator)`, `mode()`."""

    @property
    def var(self) -> Tensor:
        return torch.exp(self.logvar)


class AutoencoderKL(Network):
    """`minisd.vae.VAE`."""

    component, kind = "vae", VAE
    core: VAE

    def hold(self, core: VAE) -> None:
        self.core = core
        self.use_slicing = self.use_tiling = False

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images (B, 3, H, W) in [-1, 1] -> `.latent_dist` over latents (B, 4, H/8, W/8), unscaled."""
        self.check_tiles(x.shape[-2:], self.config.sample_size)
        dist = DiagonalGaussian(self.sliced(lambda images: self.core.quant_conv(self.core.encoder(images)), x))
        return output(return_dict, latent_dist=dist)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        """Unscaled latents (B, 4, H/8, W/8) -> `.sample` (B, 3, H, W). `generator` is not used, there as here."""
        self.check_tiles(z.shape[-2:], self.config.sample_size // self.core.config.downsampling)
        return output(return_dict, sample=self.sliced(self.core.decode, z))

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True, generator: Any = None
    ) -> Any:
        """Encode, take the mean (or a sample), decode: `.sample`, shaped as the images."""
        dist = self.encode(sample).latent_dist
        return self.decode(dist.sample(generator) if sample_posterior else dist.mode(), return_dict)

    def sliced(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """One picture at a time after `enable_slicing`, which may round differently, else all at once."""
        return torch.cat([network(one) for one in x.split(1)]) if self.use_slicing and len(x) > 1 else network(x)

    def check_tiles(self, size: Iterable[int], tile: int) -> None:
        """What fits into one tile is the same with tiling and without; more is blended in diffusers, and not here."""
        if self.use_tiling and max(size) > tile:
            raise NotCoveredError(f"enable_vae_tiling: pictures above {self.config.sample_size} pixels are not covered")

    def enable_slicing(self) -> None:
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self) -> None:
        self.use_tiling = True

    def disable_tiling(self) -> None:
        self.use_tiling = False


# ---------------------------------------------------- schedulers


class OnTheHub(schedulers.Scheduler):
    """`from_pretrained` that can fetch: minisd's own schedulers know folders only."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Source, subfolder: str | None = None, **overrides: Any
    ) -> Self:
        """A scheduler from a folder or hub repository, or from its `subfolder`; `overrides` win over the file."""
        neutral = {name: overrides.pop(name) for name in NEUTRAL if name in overrides}
        accept(f"{cls.__name__}.from_pretrained", neutral, NEUTRAL, [])
        folder = folder_of_texts(pretrained_model_name_or_path, subfolder)
        return super().from_pretrained(folder, **overrides)


class DDIMScheduler(OnTheHub, schedulers.DDIMScheduler):
    """`minisd.DDIMScheduler`."""


class DDPMScheduler(OnTheHub, schedulers.DDPMScheduler):
    """`minisd.DDPMScheduler`."""


class DDIMInverseScheduler(OnTheHub, schedulers.DDIMInverseScheduler):
    """`minisd.DDIMInverseScheduler`."""


SCHEDULERS: dict[str, type[schedulers.Scheduler]] = {
    kind.__name__: kind for kind in (DDIMScheduler, DDPMScheduler, DDIMInverseScheduler)
}


class UncoveredScheduler:
    """Stands where a folder names a scheduler that minisd has not. Its `config` can be read, to make another."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.name, self.config = name, schedulers.SchedulerConfig(config)

    def __getattr__(self, name: str) -> NoReturn:
        own = self.__dict__.get("name")
        raise AttributeError(
            f"{own}.{name} is not covered by minisd.diffusers, whose schedulers are {', '.join(SCHEDULERS)}: "
            "set pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)"
        )
