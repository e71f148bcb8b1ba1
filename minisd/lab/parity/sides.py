"""What can be compared: a model in minisd, the same in diffusers, anybody's function or module, a trace in a file.

    minisd:PATH   diffusers:PATH   python:package.module:function   trace:FILE.safetensors

A whole pipeline (minisd, diffusers) has networks and what stands between them: the tokenizer, the schedule, guidance,
a scheduler's step, the way to pixels. Both are looked at from outside, while they run as they always do: the calls from
the loop into the networks are listened to, or answered in their place. In: a side's name. Out: a `Side`.
"""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minisd.checkpoint.keymap import COMPONENTS, KEYS
from minisd.files import CheckpointError
from minisd.lab.parity.cases import Case
from minisd.lab.parity.pairing import Network
from minisd.lab.parity.promote import as_written
from minisd.lab.parity.shadow import first_tensor

TABLES = ("alphas_cumprod", "final_alpha_cumprod")


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """One object's method, changed for a while. It keeps its signature, which pipelines look at."""
    original = getattr(owner, name)
    had_own = name in vars(owner)
    setattr(owner, name, functools.wraps(original)(make(original)))
    try:
        yield
    finally:
        if had_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def first_arguments(args: Any, kwargs: Any, count: int) -> list[Any]:
    """The first `count` arguments of a call, in the order in which they were written."""
    return [*args, *kwargs.values()][:count]


@dataclass
class UNetCall:
    """latents (R, C, H, W), timestep, context (R, T, D) -> noise (R, C, H, W): R rows, both halves of guidance."""

    latents: Tensor
    timestep: Tensor
    context: Tensor
    noise: Tensor


@dataclass
class StepCall:
    """A scheduler's step: guided noise and x_t -> x_(t-1), and x0 where it says so."""

    noise: Tensor
    timestep: Tensor
    sample: Tensor
    previous: Tensor
    x0: Tensor | None


@dataclass
class Trajectory:
    """Everything that went over the bridges between the parts of a pipeline, in one run."""

    tokens: list[Tensor] = field(default_factory=list)
    embeddings: list[Tensor] = field(default_factory=list)
    unet: list[UNetCall] = field(default_factory=list)
    steps: list[StepCall] = field(default_factory=list)
    z: Tensor | None = None  # what the VAE was given to decode
    images: Tensor | None = None

    def embedding_of(self, ids: Tensor) -> Tensor | None:
        """What the text encoder said of one row of ids, (T, D)."""
        for tokens, embeddings in zip(self.tokens, self.embeddings, strict=True):
            for row, embedding in zip(tokens, embeddings, strict=True):
                if torch.equal(row.cpu(), ids.cpu()):
                    return embedding
        return None


class Side:
    """One of the two. `name` is as the person wrote it."""

    name: str
    networks: dict[str, Network]
    has_float64 = True

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

    # What each can be asked for, on input that is given.

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
        """The pipeline's own loop, from prompt to picture."""
        raise NotImplementedError

    def answer(self, tensor: Tensor) -> Any:
        """A network's answer in the form that the loop expects."""
        return tensor

    # Listening, and answering.

    @torch.no_grad()
    def trajectory(self, case: Case, latents: Tensor, playback: Trajectory | None = None) -> Trajectory:
        """Run the loop from `latents`. With `playback` the networks say what they said there, and are not run."""
        heard = Trajectory()
        scheduler = self.scheduler()
        with (
            replaced(self.model.text_encoder, "forward", self.hears_text(heard, playback)),
            replaced(self.model.unet, "forward", self.hears_unet(heard, playback)),
            replaced(self.model.vae, "decode", self.hears_decoder(heard, playback)),
            replaced(scheduler, "step", self.hears_step(heard)),
        ):
            self.run(case, latents, scheduler)
        return heard

    def hears_text(self, heard: Trajectory, playback: Trajectory | None) -> Callable[..., Any]:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                (ids,) = first_arguments(args, kwargs, 1)
                rows = [playback.embedding_of(row) for row in ids] if playback else [None]
                known = [row for row in rows if row is not None]
                output = self.answer(torch.stack(known)) if len(known) == len(ids) else original(*args, **kwargs)
                heard.tokens.append(ids)
                heard.embeddings.append(first_tensor(output))
                return output

            return forward

        return make

    def hears_unet(self, heard: Trajectory, playback: Trajectory | None) -> Callable[..., Any]:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                latents, t, context = (torch.as_tensor(one).clone() for one in first_arguments(args, kwargs, 3))
                if playback is None:
                    output = original(*args, **kwargs)
                else:
                    there = playback.unet[min(len(heard.unet), len(playback.unet) - 1)]
                    rows = matching_rows((latents, context), (there.latents, there.context))
                    output = self.answer(there.noise[rows])
                heard.unet.append(UNetCall(latents, t, context, first_tensor(output)))
                return output

            return forward

        return make

    def hears_decoder(self, heard: Trajectory, playback: Trajectory | None) -> Callable[..., Any]:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def decode(*args: Any, **kwargs: Any) -> Any:
                (heard.z,) = first_arguments(args, kwargs, 1)
                known = playback is not None and playback.images is not None
                output = self.answer(playback.images) if known else original(*args, **kwargs)  # type: ignore[union-attr,arg-type]
                heard.images = first_tensor(output)
                return output

            return decode

        return make

    def hears_step(self, heard: Trajectory) -> Callable[..., Any]:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                noise, t, sample = first_arguments(args, kwargs, 3)
                result = original(*args, **kwargs)
                heard.steps.append(StepCall(noise, torch.as_tensor(t), sample, *both_samples(result)))
                return result

            return step

        return make


def both_samples(result: Any) -> tuple[Tensor, Tensor | None]:
    """x_(t-1) and x0 of what a scheduler's step returns."""
    found = tuple(result.values()) if isinstance(result, Mapping) else tuple(result)
    return found[0], found[1] if len(found) > 1 else None


Inputs = tuple[Tensor, Tensor]  # of a UNet: latents and context


def matching_rows(mine: Inputs, theirs: Inputs) -> list[int]:
    """For each row of a UNet's input the row of the other's that it stands for.

    A loop may have the two halves of guidance in either order. What is wrong in latents or in context alone must not
    upset the order of the other: rows that agree in one of the two are taken for the same.
    """
    count = len(theirs[0])
    same, swapped = list(range(count)), [*range(count // 2, count), *range(count // 2)]
    if len(mine[0]) == count:
        latents, contexts = zip(mine, theirs, strict=True)
        for rows in (same, swapped):
            if agree(*latents, rows) and agree(*contexts, rows):
                return rows
        for pair, rows in ((latents, same), (contexts, same), (contexts, swapped)):
            if agree(*pair, rows):
                return rows
    return nearest_rows(mine, theirs)


def agree(mine: Tensor, theirs: Tensor, rows: list[int]) -> bool:
    """Are these the same rows, up to rounding in any dtype?"""
    if mine.shape != theirs.shape:
        return False
    return bool((mine - theirs[rows]).abs().max() <= 0.01 * theirs.abs().max())


def nearest_rows(mine: Inputs, theirs: Inputs) -> list[int]:
    """For each row the nearest of the other's, each taken once as long as there are any."""
    free = list(range(len(theirs[0])))
    rows = []
    for index in range(len(mine[0])):

        def apart(row: int, index: int = index) -> float:
            return sum(
                float((m[index] - t[row]).abs().max()) if m[index].shape == t[row].shape else float("inf")
                for m, t in zip(mine, theirs, strict=True)
            )

        best = min(free or range(len(theirs[0])), key=apart)
        if best in free:
            free.remove(best)
        rows.append(best)
    return rows


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
        shape = (len(case.prompts), self.config.vae.latent_channels, *self.model.latent_size(case.height, case.width))
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
