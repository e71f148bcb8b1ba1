"""The parts of a latent diffusion model as one thing: loaded, saved, looked into, given adapters.

`pipeline.py` is what they do together. In: a name, folder or file. Out: three torch modules, a tokenizer, a noise
schedule. Next in the walk: `checkpoint/keymap.py`, how weight files become these modules.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor

from minisd.adapters.loading import Adapters
from minisd.backends import check_engine, prepare
from minisd.checkpoint.load import build, open_checkpoint, read_tokenizer, usable_device
from minisd.checkpoint.save import Model, save
from minisd.config import ModelConfig
from minisd.notebook import table
from minisd.text_encoder import TextEncoder
from minisd.tiny_vae import TinyVAE, load_tiny_vae
from minisd.tokenizer import CLIPTokenizer
from minisd.unet import UNet
from minisd.vae import VAE
from minisd.warn import warn

if TYPE_CHECKING:
    from typing_extensions import Self

    from minisd.adapters.lora import LoRA
    from minisd.lab.taps import Taps


class LatentDiffusionModel:
    """Text encoder, UNet, VAE and tokenizer.

    `text_encoder`, `unet`, `vae` are torch modules, `tokenizer` a callable from strings to ids, `scheduler_config` the
    noise schedule, `generation` the settings that the model's makers recommend (may be empty), `adapters` the LoRAs
    and the added tokens that are loaded on top.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        unet: UNet,
        vae: VAE,
        tokenizer: CLIPTokenizer,
        *,
        scheduler: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        """`scheduler`: constructor arguments of the noise schedule, under diffusers' names."""
        self.text_encoder, self.unet, self.vae, self.tokenizer = text_encoder, unet, vae, tokenizer
        self.scheduler_config, self.generation = dict(scheduler), dict(generation or {})
        self.adapters = Adapters(self)
        self.origin: dict[str, Any] = {}  # the arguments of `load` that were not its defaults, as text

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] = "emoji",
        *,
        dtype: torch.dtype | None = torch.float32,
        device: str | torch.device = "cpu",
        weights: str = "auto",
        vae: str | os.PathLike[str] | None = None,
        tokenizer: str | os.PathLike[str] | CLIPTokenizer | None = None,
        prediction: str | None = None,
        engine: str = "exact",
    ) -> "Self":
        """Load a model from `source`: "emoji" (comes with minisd), "sd15", a folder in diffusers' layout, a
        `.safetensors` file, or a hub repository id.

        `dtype=None` keeps the file's. `weights`: "auto", "ema" (averaged) or "raw" UNet weights, where a file has both.
        `vae`, `tokenizer`: a path that replaces the model's own; a file of TAESD for a tiny VAE (`tiny_vae.py`).
        `prediction`: "epsilon", "v_prediction" or "sample",
        where the files do not say what the UNet predicts. `engine`: "exact", "fast", "openvino" or "compile", see
        `backends`. Raises ValueError for an engine that is not there, FileNotFoundError for a path that is not there,
        `minisd.CheckpointError` for a file that cannot be used.
        """
        check_engine(engine)
        device = usable_device(device)
        tiny = None if vae is None else load_tiny_vae(vae, dtype, device)
        checkpoint = open_checkpoint(
            source, dtype=dtype, weights=weights, vae=None if tiny else vae, tokenizer=tokenizer, prediction=prediction
        )
        for note in checkpoint.notes:
            warn(note)
        parts, own_tokenizer = checkpoint.components, read_tokenizer(checkpoint)
        if parts["unet"].config.added_width:
            cls = import_module("minisd.xl").StableDiffusionXL  # it stands on this file
        kinds = {"text_encoder": TextEncoder, "unet": UNet, "vae": VAE, "text_encoder_2": TextEncoder}
        dtypes = cls.dtypes(dtype)
        networks: dict[str, Any] = {
            name: build(kinds[name], part, dtypes.get(name, dtype), device) for name, part in parts.items()
        }
        networks |= {"vae": tiny} if tiny else {}
        settings: dict[str, Any] = {"scheduler": checkpoint.scheduler, "generation": checkpoint.generation}
        model = cls(**networks, tokenizer=own_tokenizer, **settings)
        prepare(engine, model.unet, model.vae)
        given = {"weights": weights, "vae": vae, "tokenizer": tokenizer, "prediction": prediction, "engine": engine}
        usual = {"weights": "auto", "engine": "exact"}
        model.origin = {"source": os.fspath(source), "dtype": str(dtype).removeprefix("torch.")}
        model.origin |= {name: str(value) for name, value in given.items() if value != usual.get(name)}
        return model

    @classmethod
    def dtypes(cls, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
        """The networks that need another dtype than the one that is asked for."""
        return {}

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    @property
    def config(self) -> ModelConfig:
        """Every number of the architecture and of the noise schedule."""
        parts: dict[str, Any] = {name: module.config for name, module in self.modules.items()}
        return ModelConfig(**{"text_encoder_2": None, **parts}, scheduler=self.scheduler_config)

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def vae_dtype(self) -> torch.dtype:
        """SDXL's may be another than its UNet's: see `dtypes`."""
        return next(self.vae.parameters()).dtype

    def _repr_html_(self) -> str:
        """In a notebook: its parts, and what it is recommended to be used with."""
        rows = {name: sum(weight.numel() for weight in part.parameters()) for name, part in self.modules.items()}
        told: dict[str, Any] = {f"{name}, parameters": count for name, count in rows.items()}
        told |= {"dtype": self.dtype, "device": self.device, "scheduler": self.scheduler_config.get("_class_name", "?")}
        return table(f"{type(self).__name__} {self.origin.get('source', '')}", told | self.generation)

    def read(self, ids: Tensor, clip_skip: int) -> Tensor:
        """Token ids in windows (B, n, 77) -> context (B, 77 n, D)."""
        context = self.text_encoder(ids.flatten(0, 1), clip_skip=clip_skip)  # (B n, 77, D)
        return rearrange(context, "(b n) t d -> b (n t) d", n=ids.shape[1])

    def state(self) -> dict[str, Tensor]:
        """Every weight by name, "unet.down.4.attention.cross_attn.q.weight": the model's own memory, to write into."""
        states = {part: module.state_dict() for part, module in self.modules.items()}
        return {f"{part}.{name}": weight for part, state in states.items() for name, weight in state.items()}

    def save(self, path: str | os.PathLike[str], layout: str = "diffusers", dtype: torch.dtype | None = None) -> None:
        """Write the model to `path`: a folder that diffusers loads too, or one file in the "compvis" layout.

        Loaded LoRAs are merged into the weights that are written; added tokens are in the vocabulary. Raises ValueError
        for another layout, FileExistsError where something else than a model is in the way.
        """
        if isinstance(self.vae, TinyVAE):
            raise ValueError("this model has a TAESD in the place of its VAE, and cannot be saved with it")
        states = self.adapters.merged({name: module.state_dict() for name, module in self.modules.items()})
        save(Model(states, self.config, self.tokenizer, self.generation), path, layout=layout, dtype=dtype)

    # ------------------------------------------------ adapters and taps

    def load_lora(self, path: str | os.PathLike[str], scale: float = 1.0) -> "LoRA":
        """Add a LoRA (Hu et al. 2021, arXiv:2106.09685) beside the weights: see `Adapters.load_lora`."""
        return self.adapters.load_lora(path, scale)

    def unload_lora(self, path: str | os.PathLike[str] | None = None) -> None:
        """Remove the LoRA of this path, or all: the model is as it was, to the last bit."""
        self.adapters.unload_lora(path)

    def load_embedding(self, path: str | os.PathLike[str] | Tensor, token: str | None = None) -> list[str]:
        """Add the tokens of a textual inversion (Gal et al. 2022, arXiv:2208.01618): `Adapters.load_embedding`."""
        return self.adapters.load_embedding(path, token)

    def unload_embedding(self, token: str | None = None) -> None:
        """Remove one added token, or all."""
        self.adapters.unload_embedding(token)

    def taps(self, *patterns: str, **settings: Any) -> "Taps":
        """Read, or edit, any intermediate tensor while the model runs: see `lab/taps.py`."""
        from minisd.lab.taps import Taps

        return Taps(self, *patterns, **settings)
