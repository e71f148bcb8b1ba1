"""Whole models to compare: one in minisd, one in diffusers, each with its own loop.

A pipeline has networks and what is computed between them: the tokenizer, the schedule, guidance, a scheduler's step,
the conversion to pixels. Both are observed from outside, while they run as they always do. In: a path. Out: a
`PipelineSide`. Next: `opening.py`.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from minisd.checkpoint.keymap import COMPONENTS, KEYS
from minisd.files import CheckpointError
from minisd.lab.hooks import Listener
from minisd.lab.parity.calls import first_tensor
from minisd.lab.parity.cases import Case
from minisd.lab.parity.pairing import Network
from minisd.lab.parity.promote import as_written
from minisd.lab.parity.trajectory import Trajectory, recording

TABLES = ("alphas_cumprod", "final_alpha_cumprod")


class Side:
    """One of the two that are compared. `name` is as it was typed."""

    name: str
    networks: dict[str, Network]

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}


class PipelineSide(Side):
    """A whole model with its own loop. Subclasses say how theirs is called."""

    def __init__(self, name: str, model: Any, config: Any) -> None:
        self.name, self.model, self.config = name, model, config
        self.networks = {component: self.network(component) for component in COMPONENTS}

    def network(self, component: str) -> Network:
        raise NotImplementedError

    @property
    def factor(self) -> int:
        return self.config.vae.downsampling

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.unet.parameters()).dtype

    # What each computes from given inputs. Images are (B, 3, H, W) in [-1, 1], pixels (B, H, W, 3) bytes.

    def tokens(self, texts: list[str]) -> Tensor:
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        return first_tensor(self.model.text_encoder(ids))

    def predict(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return first_tensor(self.model.unet(latents, timestep, context))

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def pixels(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def drawn(self, case: Case) -> Tensor:
        raise NotImplementedError

    def scheduler(self) -> Any:
        """The scheduler that the loop uses, its tables in the precision that is set now."""
        raise NotImplementedError

    def run(self, case: Case, latents: Tensor, scheduler: Any) -> None:
        """The pipeline's own loop, from prompt to image."""
        raise NotImplementedError

    def answer(self, tensor: Tensor) -> Any:
        """A network's answer in the form that the loop expects."""
        return tensor

    # Recording, and answering.

    @torch.no_grad()
    def trajectory(self, case: Case, latents: Tensor, playback: Trajectory | None = None) -> Trajectory:
        """Run the loop from `latents`. With `playback` the networks return what they did there, and are not run."""
        heard, scheduler = Trajectory(), self.scheduler()
        around = recording(heard, self.answer, playback)
        with Listener() as listener:
            listener.around(self.model.text_encoder, "forward", around["text_encoder"])
            listener.around(self.model.unet, "forward", around["unet"])
            listener.around(self.model.vae, "decode", around["vae"])
            listener.around(scheduler, "step", around["step"])
            self.run(case, latents, scheduler)
        return heard


class MinisdSide(PipelineSide):
    """minisd's own."""

    def network(self, component: str) -> Network:
        root = getattr(self.model, component)
        weights = {key.minisd: key.minisd for key in KEYS[component](root.config)}
        return Network(component, root, root.config, weights)

    def tokens(self, texts: list[str]) -> Tensor:
        return self.model.tokenizer(texts)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        gaussian = self.model.vae.encode(images)
        return {"mean": gaussian.mean, "logvar": gaussian.logvar, "std": gaussian.std}

    def decode(self, z: Tensor) -> Tensor:
        return self.model.vae.decode(z)

    def pixels(self, images: Tensor) -> Tensor:
        from minisd import pipeline

        to_pictures = getattr(self.model, "to_pictures", pipeline.to_pictures)  # a copy may have its own
        return pictures_as_tensor(to_pictures(images))

    def drawn(self, case: Case) -> Tensor:
        shape = (len(case.prompts), *self.model.latent_shape(case.height, case.width))
        return self.model.initial_noise(shape, torch.Generator().manual_seed(case.seed), None)

    def scheduler(self) -> Any:
        return self.model.make_scheduler(None)

    def run(self, case: Case, latents: Tensor, scheduler: Any) -> None:
        steps = self.model.denoise(
            list(case.prompts),
            negative_prompt=list(case.negatives),
            steps=case.steps,
            guidance_scale=case.guidance,
            height=case.height,
            width=case.width,
            latents=latents,
            scheduler=scheduler,
        )
        *_, last = steps
        self.model.decode(last.latents)

    def versions(self) -> dict[str, str]:
        import minisd

        return {**super().versions(), "minisd": minisd.__version__}


class DiffusersSide(PipelineSide):
    """diffusers' StableDiffusionPipeline, live."""

    def network(self, component: str) -> Network:
        root, config = getattr(self.model, component), getattr(self.config, component)
        have = {name for name, _ in root.named_parameters()}
        weights = {}
        for key in KEYS[component](config):
            for name in (key.diffusers, *key.older, key.diffusers.removeprefix("text_model.")):
                if name in have:
                    weights[name] = key.minisd
        return Network(component, root, config, weights)

    def tokens(self, texts: list[str]) -> Tensor:
        length = self.model.tokenizer.model_max_length
        found = self.model.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return found.input_ids

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        gaussian = self.model.vae.encode(images).latent_dist
        return {"mean": gaussian.mean, "logvar": gaussian.logvar, "std": gaussian.std}

    def decode(self, z: Tensor) -> Tensor:
        return self.model.vae.decode(z).sample

    def pixels(self, images: Tensor) -> Tensor:
        return pictures_as_tensor(self.model.image_processor.postprocess(images.detach(), output_type="pil"))

    def drawn(self, case: Case) -> Tensor:
        channels, generator = self.config.vae.latent_channels, torch.Generator().manual_seed(case.seed)
        size = (len(case.prompts), channels, case.height, case.width)
        return self.model.prepare_latents(*size, self.dtype, self.model.unet.device, generator)

    def scheduler(self) -> Any:
        """A copy of the one there is; tables that its settings explain are made anew, in the precision of now."""
        mine = self.model.scheduler
        with as_written():
            explained = tables_of(type(mine).from_config(mine.config))
        now, twin = tables_of(type(mine).from_config(mine.config)), copy.deepcopy(mine)
        for name, table in tables_of(mine).items():
            if name in explained and torch.equal(table, explained[name]):
                setattr(twin, name, now[name])
        return twin

    def run(self, case: Case, latents: Tensor, scheduler: Any) -> None:
        before, self.model.scheduler = self.model.scheduler, scheduler
        try:
            self.model(
                prompt=list(case.prompts),
                negative_prompt=list(case.negatives),
                num_inference_steps=case.steps,
                guidance_scale=case.guidance,
                height=case.height,
                width=case.width,
                latents=latents,
                output_type="pt",
            )
        finally:
            self.model.scheduler = before

    def answer(self, tensor: Tensor) -> Any:
        return (tensor,)

    def versions(self) -> dict[str, str]:
        import diffusers
        import transformers

        return {**super().versions(), "diffusers": diffusers.__version__, "transformers": transformers.__version__}


def tables_of(scheduler: Any) -> dict[str, Tensor]:
    """The tensors that a scheduler keeps."""
    return {name: value for name, value in vars(scheduler).items() if isinstance(value, Tensor)}


def pictures_as_tensor(pictures: Any) -> Tensor:
    """PIL images -> (B, H, W, 3) uint8."""
    import numpy as np

    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))


# ---- opening ---------------------------------------------------------------------------------------------


def minisd_side(path: str, name: str | None = None, dtype: torch.dtype | None = torch.float32) -> MinisdSide:
    """minisd's model from `path`. Raises CheckpointError, FileNotFoundError."""
    from minisd import StableDiffusion

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd = StableDiffusion.load(path, dtype=dtype)
    return MinisdSide(name or f"minisd:{path}", sd, sd.config)


def diffusers_side(path: str, name: str | None = None, dtype: torch.dtype = torch.float32) -> DiffusersSide:
    """diffusers' pipeline from a folder (or a single file). Raises ValueError where diffusers is missing or refuses."""
    try:
        import diffusers
        import transformers
    except ImportError:
        raise ValueError("diffusers is not installed: pip install 'minisd[parity]'") from None
    from minisd.checkpoint.load import open_checkpoint

    config = open_checkpoint(path, dtype=dtype).config  # says what is wrong with the files in one sentence
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    kind = diffusers.StableDiffusionPipeline
    quiet = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load = kind.from_single_file if str(path).endswith(".safetensors") else kind.from_pretrained
            pipeline = load(located(path), torch_dtype=dtype, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: diffusers cannot load it ({str(error).splitlines()[0]})") from None
    pipeline.set_progress_bar_config(disable=True)
    return DiffusersSide(name or f"diffusers:{path}", pipeline, config)


def located(path: str) -> str:
    """ "emoji" is a folder that minisd knows the place of."""
    from minisd.checkpoint.hub import resolve

    return str(resolve(path))


SHAPES = {
    "unet": ("in_channels", "out_channels", "widths", "attention", "resnets_per_level", "context_width"),
    "vae": ("image_channels", "latent_channels", "widths", "resnets_per_level"),
    "text_encoder": ("vocabulary", "context_length", "width", "layers", "hidden_width"),
}


def check_shapes(a: PipelineSide, b: PipelineSide) -> None:
    """Raise ValueError for two models of which one's weights cannot be the other's."""
    for component, names in SHAPES.items():
        for name in names:
            one, other = (getattr(getattr(side.config, component), name) for side in (a, b))
            if one != other:
                raise ValueError(f"{component}: {name} is {one} in A and {other} in B: shapes that cannot be paired")
