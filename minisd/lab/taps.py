"""Taps: read, or change, anything inside a model while it works, by name.

    with sd.taps("unet.*.cross_attn.probabilities", keep=True) as taps:
        sd.text_to_image("red heart", seed=1)
    for reading in taps["unet.middle.0.attention.cross_attn.probabilities"]:
        print(reading.step, reading.absmax, reading.positive.shape)

A name is minisd's (`unet.down.4.resnet`), diffusers' (`down_blocks.1.attentions.1`) or CompVis'
(`model.diffusion_model.input_blocks.5.0`), with `*` for anything. There are taps on every module's output, and on
tensors that no module returns: attention weights, residual connections, the sinusoidal timestep embedding, both noise
predictions of classifier-free guidance, latents and predicted clean latents (x0) of each step. `minisd taps --list`
shows all of them.

Reading changes no bit of the result. Statistics stream; tensors are kept only if asked for. Hooks are gone afterwards,
after an exception too. In: a model and patterns. Out: `Reading`s.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from minisd.config import ModelConfig
from minisd.lab.hooks import Listener, silenced
from minisd.lab.names import module_names
from minisd.lab.sources import source_of
from minisd.layers import Attention, ResnetBlock
from minisd.notebook import table
from minisd.text_encoder import TextEncoder
from minisd.unet import SpatialTransformer, TimeEmbedding, UNet
from minisd.vae import VAE

COMPONENTS = ("text_encoder", "unet", "vae")


@dataclass
class Reading:
    """One tensor that a tap has read. Statistics are over all finite numbers; NaN where there are none."""

    name: str
    step: int | None  # of the sampling loop; None outside of it
    timestep: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    mean: float = float("nan")
    std: float = float("nan")
    absmax: float = float("nan")
    nonfinite: int = 0  # how many numbers are infinite or no number
    halves: bool = False  # does the batch hold both halves of guidance, the negative first?
    tensor: Tensor | None = None  # only with keep=True

    @property
    def negative(self) -> Tensor:
        """The negative prompt's half of the batch. Raises ValueError where there are no halves, or no tensor."""
        return self.half(0)

    @property
    def positive(self) -> Tensor:
        """The prompt's half of the batch. Raises ValueError where there are no halves, or no tensor."""
        return self.half(1)

    def half(self, index: int) -> Tensor:
        if self.tensor is None:
            raise ValueError(f"{self.name}: no tensor was kept; ask for it with keep=True")
        if not self.halves:
            raise ValueError(f"{self.name}: this run has no guidance, so there are no halves")
        return self.tensor.chunk(2)[index]


Edit = Callable[[Tensor, Reading], Tensor]


@dataclass(frozen=True)
class Point:
    """A place where a tap can be."""

    name: str
    aliases: tuple[str, ...]
    kind: str  # "output", "probabilities", "residual", "waves" or "loop"
    module: nn.Module | None
    meaning: str
    source: str

    def answers(self, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in (self.name, *self.aliases))


class Taps:
    """A context in which taps are open. `taps.readings` in order, `taps[name]` those of one name, in any dialect.

    `patterns`: what to read; `edit`: pattern -> function(tensor, reading) -> another tensor of that shape, put in its
    place (the function may write into the one it is given: that is a copy); `keep`: keep tensors (on their device);
    `stats`: compute mean, std, absmax; `listen`: called with each reading. Raises ValueError for a pattern that no name
    answers to, an edit of `x0`, an edit that returns something else, and if entered twice at once.
    """

    def __init__(
        self,
        model: Any,
        *patterns: str,
        keep: bool = False,
        stats: bool = True,
        edit: Mapping[str, Edit] | None = None,
        listen: Callable[[Reading], None] | None = None,
    ) -> None:
        self.model, self.keep, self.stats, self.listen = model, keep, stats, listen
        self.points = points(model)
        self.edits = [(self.editable(pattern), function) for pattern, function in (edit or {}).items()]
        chosen = {point.name for pattern in patterns for point in self.find(pattern)}
        self.read = chosen or ({point.name for point in self.points} if not self.edits else set())
        self.readings: list[Reading] = []
        self.step: int | None = None
        self.timestep: int | None = None
        self.halves = False
        self.listener = Listener()
        self.session: object | None = None  # new each time that these taps are opened; None while they are closed

    def editable(self, pattern: str) -> list[Point]:
        """The points that answer to a pattern, if they may be edited. `x0` is seen only; "*" leaves it out."""
        found = self.find(pattern)
        if [point.name for point in found] == ["x0"]:
            raise ValueError(f"edit {pattern!r}: x0 is shown only, nothing is computed from it; edit 'latents' instead")
        return [point for point in found if point.name != "x0"]

    def find(self, pattern: str) -> list[Point]:
        """The points that answer to a pattern. Raises ValueError if there are none."""
        found = [point for point in self.points if point.answers(pattern)]
        if not found:
            names = [name for point in self.points for name in (point.name, *point.aliases)]
            near = difflib.get_close_matches(pattern, names, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; see `minisd taps --list`"
            raise ValueError(f"no tap answers to {pattern!r}{hint}")
        return found

    def __getitem__(self, name: str) -> list[Reading]:
        names = {point.name for point in self.find(name)}
        return [reading for reading in self.readings if reading.name in names]

    def _repr_html_(self) -> str:
        """In a notebook: what was read."""
        rows = [(one.name, one.step, one.shape, one.mean, one.std, one.absmax) for one in self.readings]
        return table(f"{len(rows):,} readings", rows, ("tap", "step", "shape", "mean", "std", "absmax"))

    # ---- opening and closing

    def __enter__(self) -> "Taps":
        if self.session is not None:
            raise ValueError("these taps are open already: make others, with sd.taps(...), for a second `with`")
        edited = {point.name for points, _ in self.edits for point in points}
        with Listener() as listener:
            self.session = object()
            listener.callback(self.close)
            for point in self.points:
                if point.name in self.read | edited and point.kind != "loop":
                    OPENERS[point.kind](self, point, listener)
            self.follow_the_loop(listener)
            self.listener = listener.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listener.close()

    def close(self) -> None:
        self.session = self.step = self.timestep = None
        self.halves = False

    def follow_the_loop(self, listener: Listener) -> None:
        """Know which step it is, and read what is between the networks."""
        listener.before(self.model.unet, self.note_timestep)
        listener.after(self.model.unet, self.guidance_pair)
        for name, wrapper in (("predict_noise", self.guided), ("denoise", self.denoising)):
            if hasattr(self.model, name):
                listener.around(self.model, name, wrapper)

    def note_timestep(self, args: Any, kwargs: Any) -> None:
        timesteps = torch.as_tensor(args[1] if len(args) > 1 else kwargs.get("timesteps"))
        self.timestep = None if timesteps.is_meta else int(timesteps.flatten()[0])

    def guidance_pair(self, _: Any, __: Any, output: Tensor) -> Tensor | None:
        if not self.halves:
            return None
        both = output.chunk(2)
        passed = [self.passes(f"guidance.{name}", half, False) for name, half in zip(HALVES, both, strict=True)]
        changed = any(new is not old for new, old in zip(passed, both, strict=True))
        return torch.cat(passed) if changed else None

    def guided(self, predict_noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        session = self.session

        def wrapper(x: Tensor, t: Tensor, context: Tensor, guidance_scale: float, *rest: Any, **more: Any) -> Tensor:
            if self.session is not session:  # a loop that began inside goes on after the end
                return predict_noise(x, t, context, guidance_scale, *rest, **more)
            self.halves = guidance_scale > 1
            try:
                return self.passes(
                    "guidance.guided", predict_noise(x, t, context, guidance_scale, *rest, **more), False
                )
            finally:
                self.halves = False

        return wrapper

    def denoising(self, denoise: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """Each step of the loop, read and edited for as long as the taps are open: it may go on afterwards."""
        session = self.session

        def wrapper(*args: Any, **settings: Any) -> Iterator[Any]:
            self.step = settings.get("start", 0)
            try:
                for step in denoise(*args, **settings):
                    if self.session is session:
                        self.step, self.timestep = step.index, step.timestep
                        step.x0 = self.passes("x0", step.x0, False)
                        step.latents = self.passes("latents", step.latents, False)
                    yield step
                    if self.session is session:
                        self.step = step.index + 1
            finally:
                if self.session is session:
                    self.step = self.timestep = None

        return wrapper

    # ---- reading and editing

    def passes(self, name: str, tensor: Tensor, halves: bool | None = None) -> Tensor:
        """Read a tensor, and return it, or what the edits make of it."""
        reading = self.reading(name, tensor, self.halves if halves is None else halves)
        for points, function in self.edits:
            if any(point.name == name for point in points):
                tensor = answer(name, tensor, function(given := tensor.clone(), reading), given)
        if name in self.read:
            if self.stats:
                statistics(reading, [tensor])
            reading.tensor = tensor.detach().clone() if self.keep else None
            self.note(reading)
        return tensor

    def reading(self, name: str, tensor: Tensor, halves: bool) -> Reading:
        looping = name.startswith(("unet", "guidance", "latents", "x0"))
        step, timestep = (self.step, self.timestep) if looping else (None, None)
        return Reading(name, step, timestep, tuple(tensor.shape), tensor.dtype, halves=halves)

    def note(self, reading: Reading) -> None:
        self.readings.append(reading)
        if self.listen is not None:
            self.listen(reading)

    def edited(self, name: str) -> bool:
        return any(point.name == name for points, _ in self.edits for point in points)


HALVES = ("negative", "positive")


def answer(name: str, tensor: Tensor, said: Any, given: Tensor) -> Tensor:
    """What an edit made of `tensor`, of which it was `given` a copy. Raises ValueError for what will not do instead."""
    if not isinstance(said, Tensor):
        raise ValueError(f"the edit of {name} must return a tensor, not a {type(said).__name__}")
    if said.shape != tensor.shape:
        raise ValueError(
            f"the edit of {name} must return a tensor of shape {tuple(tensor.shape)}, not {tuple(said.shape)}"
        )
    if said is given and torch.equal(said, tensor):
        return tensor  # untouched: not a bit of what follows may change
    return said.to(tensor)


def statistics(reading: Reading, parts: list[Tensor] | Iterator[Tensor]) -> None:
    """Mean, standard deviation, largest magnitude and non-finite count of a tensor that comes in parts.

    Squares are summed around each part's own mean (Chan, Golub & LeVeque 1983): nothing cancels.
    """
    count, mean, squares = 0, 0.0, 0.0
    for part in parts:
        values = part.detach().flatten()
        finite = values.isfinite()
        if not bool(finite.all()):
            reading.nonfinite += int((~finite).sum())
            values = values[finite]
        if values.numel():
            new, own = values.numel(), float(values.sum(dtype=torch.float64)) / values.numel()
            gap, total = own - mean, count + new
            squares += float(torch.linalg.vector_norm(values.float() - own)) ** 2 + gap**2 * count * new / total
            count, mean = total, mean + gap * new / total
            largest = float(values.abs().max())
            reading.absmax = largest if reading.absmax != reading.absmax else max(reading.absmax, largest)
    if count:
        reading.mean, reading.std = mean, (squares / count) ** 0.5


# ---- how each kind of tap is opened ----------------------------------------------------------------------


def open_output(taps: Taps, point: Point, listener: Listener) -> None:
    """What a module returns."""
    assert point.module is not None

    def hear(_: Any, __: Any, output: Tensor) -> Tensor | None:
        passed = taps.passes(point.name, output, taps.halves)
        return None if passed is output else passed

    listener.after(point.module, hear)


def open_waves(taps: Taps, point: Point, listener: Listener) -> None:
    """The sinusoidal embedding that the time embedding's layers are given."""
    assert point.module is not None

    def hear(args: Any, kwargs: Any) -> Any:
        passed = taps.passes(point.name, args[0])
        return None if passed is args[0] else ((passed, *args[1:]), kwargs)

    listener.before(point.module, hear)


def open_residual(taps: Taps, point: Point, listener: Listener) -> None:
    """The residual connection of a block: its input, through a shortcut where the number of channels changes."""
    block: Any = point.module

    def hear(args: Any, _: Any, output: Tensor) -> Tensor | None:
        shortcut = getattr(block, "shortcut", None)
        with silenced(shortcut):
            residual = shortcut(args[0]) if shortcut is not None else args[0]
        passed = taps.passes(point.name, residual)
        return None if passed is residual else output + (passed - residual)

    listener.after(block, hear)


def open_probabilities(taps: Taps, point: Point, listener: Listener) -> None:
    """softmax(q k^T / sqrt(d)), (B, heads, N, M): computed beside the fused kernel, whose result is not changed.

    An edited map takes the kernel's place: its product with v goes into the last layer.
    """
    attention: Any = point.module
    heard: dict[str, Any] = {}

    def remember(name: str) -> Callable[..., None]:
        return lambda _args, _kwargs, output: heard.update({name: output})

    def ends(_: Any, kwargs: Any) -> Any:
        split = (rearrange(heard.pop(name), "b n (h d) -> b h n d", h=attention.heads) for name in "qkv")
        q, k, v = split
        if not taps.keep and not taps.edited(point.name):
            return stream(q, k)
        maps = probabilities(q, k, causal=heard["causal"])
        passed = taps.passes(point.name, maps)
        return None if passed is maps else ((rearrange(passed.to(v.dtype) @ v, "b h n d -> b n (h d)"),), kwargs)

    def stream(q: Tensor, k: Tensor) -> None:  # one head at a time: all maps together may not fit in memory
        shape = torch.empty(*q.shape[:3], k.shape[2], device="meta", dtype=q.dtype)
        reading = taps.reading(point.name, shape, taps.halves)
        if taps.stats:
            heads, causal = range(attention.heads), heard["causal"]
            statistics(reading, (probabilities(q[:, h : h + 1], k[:, h : h + 1], causal=causal) for h in heads))
        taps.note(reading)

    listener.before(attention, lambda _, kwargs: heard.update(causal=kwargs["causal"]))
    for name in "qkv":
        listener.after(getattr(attention, name), remember(name))
    listener.before(attention.out, ends)


def probabilities(q: Tensor, k: Tensor, *, causal: bool) -> Tensor:
    """q (B, h, N, d), k (B, h, M, d) -> (B, h, N, M), rows that add up to 1."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    return scores.softmax(dim=-1)


OPENERS: dict[str, Callable[[Taps, Point, Listener], None]] = {
    "output": open_output,
    "waves": open_waves,
    "residual": open_residual,
    "probabilities": open_probabilities,
}


# ---- what there is to tap --------------------------------------------------------------------------------

LOOP = {
    "guidance.negative": "the noise prediction for the negative prompt",
    "guidance.positive": "the noise prediction for the prompt",
    "guidance.guided": "both combined by classifier-free guidance: what the scheduler is given",
    "x0": "the predicted clean latents (x0-hat) of each step",
    "latents": "the latents after each step",
}
MEANINGS = {  # by the last part of a name
    "q": "queries",
    "k": "keys",
    "v": "values",
    "out": "the output projection of attention, heads concatenated",
    "time": "the timestep embedding, projected for this block",
    "shortcut": "the residual connection, projected to another number of channels",
    "expand": "the hidden layer of a feed-forward network",
    "contract": "the output of a feed-forward network, before its residual connection",
    "proj_in": "feature map positions as a sequence",
    "proj_out": "the output of a transformer, before its residual connection",
    "conv_in": "the first feature map; also the first skip connection",
    "conv_out": "the output of the network",
}


def points(model: Any) -> list[Point]:
    """Every place of a model where a tap can be, in the order of its modules; the loop's come last."""
    found: list[Point] = []
    for component in COMPONENTS:
        root = getattr(model, component)
        aliases = {names.minisd: names.all[1:] for names in module_names(component, root.config)}
        for path, module in root.named_modules():
            if isinstance(module, nn.ModuleList) or (module is root and component == "vae"):
                continue  # they are never called
            name = f"{component}.{path}".rstrip(".")
            found += points_at(name, aliases.get(name, ()), module, enclosing(root, path))
    loop = getattr(type(model), "denoise", None)
    source = source_of(loop) if loop is not None else "minisd/pipeline.py"
    return found + [Point(name, (), "loop", None, meaning, source) for name, meaning in LOOP.items()]


def points_at(name: str, aliases: tuple[str, ...], module: nn.Module, source: str) -> Iterator[Point]:
    """A module's output, and what else there is to see in it."""
    last = name.rpartition(".")[2]
    doc = (type(module).__doc__ or "").strip().splitlines()
    own = type(module).__module__.startswith("minisd")
    meaning = MEANINGS.get(last) or (doc[0] if own and doc else type(module).__name__)
    yield Point(name, aliases, "output", module, meaning, source)

    def more(kind: str, meaning: str) -> Point:
        return Point(f"{name}.{kind}", tuple(f"{alias}.{kind}" for alias in aliases), kind, module, meaning, source)

    if isinstance(module, Attention):
        yield more("probabilities", "attention weights (batch, heads, query, key), rows add up to 1")
    if isinstance(module, ResnetBlock | SpatialTransformer):
        yield more("residual", "the residual connection of the block")
    if isinstance(module, TimeEmbedding):
        yield more("waves", "the sinusoidal timestep embedding: cosines, then sines")


def enclosing(root: nn.Module, path: str) -> str:
    """Where the code is that computes a module: its own, or for torch's layers that of the block around it."""
    module = root.get_submodule(path)
    while path and not type(module).__module__.startswith("minisd"):
        path = path.rpartition(".")[0]
        module = root.get_submodule(path)
    return source_of(module)


@dataclass
class Row:
    """A line of `minisd taps --list`."""

    name: str
    shape: tuple[int, ...]
    meaning: str
    source: str
    aliases: tuple[str, ...] = field(default=())


@torch.no_grad()
def catalogue(config: ModelConfig) -> list[Row]:
    """Every tap of a model of this configuration, with its shape in a guided run for one image. Needs no weights."""
    from types import SimpleNamespace

    with torch.device("meta"):
        model = SimpleNamespace(
            text_encoder=TextEncoder(config.text_encoder), unet=UNet(config.unet), vae=VAE(config.vae)
        )
        size, factor = config.unet.own_size, config.vae.downsampling
        latents = torch.empty(1, config.vae.latent_channels, *size)
        with Taps(model, stats=False) as taps:
            context = model.text_encoder(torch.zeros(2, config.text_encoder.context_length, dtype=torch.long))
            model.unet(torch.empty(2, config.unet.in_channels, *size), torch.tensor(0), context)
            model.vae.encode(torch.empty(1, config.vae.image_channels, factor * size[0], factor * size[1]))
            model.vae.decode(latents)
    shapes = {reading.name: reading.shape for reading in taps.readings}
    shapes |= dict.fromkeys(LOOP, tuple(latents.shape))
    return [
        Row(point.name, shapes[point.name], point.meaning, point.source, point.aliases)
        for point in points(model)
        if point.name in shapes
    ]
