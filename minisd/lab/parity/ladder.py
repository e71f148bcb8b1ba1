"""The ladder from the prompt to the pixels: the results between the networks, and the networks' stages.

B's own loop is run on A's answers: text encoder, UNet and VAE are not computed, they return what A's returned. Whatever
still differs is outside of B's networks: its tokenizer, timesteps, guidance, scheduler or scaling. Each rung gets what
A's had, so that an early mistake does not make the later rungs look wrong. In: two pipelines and a case. Out: rungs, in
order, and stages that are to be replayed. Next: `replay.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minisd.lab.hooks import Listener
from minisd.lab.parity.calls import FAILURES, one_line
from minisd.lab.parity.cases import SMALL_SCALE, Case
from minisd.lab.parity.judge import Observation, distance, exact, largest, noise_levels, rung_of
from minisd.lab.parity.promote import float64
from minisd.lab.parity.sides import TABLES, PipelineSide
from minisd.lab.parity.trajectory import Trajectory, matching_rows
from minisd.lab.parity.verdict import DIFFERENT, Rung


@dataclass
class Stage:
    """A component at work on inputs that both sides get: a rung, and what is to be replayed."""

    rung: str
    component: str
    run: Callable[[PipelineSide], dict[str, Tensor]]


@dataclass
class Climb:
    """Two sides, and their loops run four times: A in float64, A and B as they are, and B's loop on A's answers."""

    a: PipelineSide
    b: PipelineSide
    case: Case
    a64: Trajectory
    a_run: Trajectory
    b_run: Trajectory | None = None
    glue: Trajectory | None = None
    trouble: str = ""  # why B's loop did not come to its end

    @classmethod
    def of(cls, a: PipelineSide, b: PipelineSide, case: Case) -> "Climb":
        """Run the loops. Raises whatever A raises: a reference that does not run is none. B may fail."""
        latents = case.latents(a.config.vae.latent_channels, a.factor)
        with float64():
            a64 = a.trajectory(case, latents.double())
        runs = cls(a, b, case, a64, a.trajectory(case, latents.to(a.dtype, copy=True)))
        try:
            with float64():
                runs.glue = b.trajectory(case, latents.double(), playback=a64)
            runs.b_run = b.trajectory(case, latents.to(b.dtype, copy=True))
        except FAILURES as error:
            runs.trouble = f"B's loop fails: {one_line(error)}"
        return runs

    @classmethod
    def alone(cls, live: PipelineSide, case: Case) -> "Climb":
        """One side's run, for a part that has no loop of its own."""
        with float64():
            run = live.trajectory(case, case.latents(live.config.vae.latent_channels, live.factor).double())
        return cls(live, live, case, run, run)

    def rungs(self) -> Iterator[Rung | Stage]:
        """Every rung in order. A `Stage` is a network's rung, which is not measured here."""
        texts = [*self.case.prompts, *self.case.negatives]
        yield exact("tokens", self.a.tokens(texts), self.b.tokens(texts))
        ids = torch.cat(self.a64.tokens)
        yield Stage("text embedding", "text_encoder", lambda side: {"context": side.embed(ids)})
        yield self.initial_noise()
        yield from self.schedule()
        for index in range(len(self.a64.unet)):
            yield from self.step(index)
        yield from self.decoding()
        yield from self.probes()
        yield self.moments()

    def initial_noise(self) -> Rung:
        """What each draws from the same seed. In two precisions the same numbers, up to the coarser's rounding."""
        drawn = self.a.drawn(self.case), self.b.drawn(self.case)
        coarser = max((tensor.dtype for tensor in drawn), key=lambda dtype: torch.finfo(dtype).eps)
        one, other = (tensor.to(coarser).float() for tensor in drawn)
        return exact("initial noise", one, other)

    def schedule(self) -> Iterator[Rung]:
        """The timesteps that the loops visit, and the noise levels."""
        if self.glue is not None:
            yield exact("timesteps", visited(self.a64), visited(self.glue))
        for name, title in zip(TABLES, ("alphas", "final alpha"), strict=True):
            written = [torch.as_tensor(getattr(side.scheduler(), name)) for side in (self.a, self.b)]
            with float64():
                exactly = [torch.as_tensor(getattr(side.scheduler(), name)).double() for side in (self.a, self.b)]
            yield noise_levels(title, written, exactly)

    def step(self, index: int) -> Iterator[Rung | Stage]:
        """The UNet's inputs and its output, guidance, and the scheduler's step."""
        here, call, step = f"step {index}", self.a64.unet[index], self.a64.steps[index]
        yield from self.unet_inputs(index, here)
        yield Stage(
            f"UNet, {here}", "unet", lambda side: {"noise": side.predict(call.latents, call.timestep, call.context)}
        )
        if self.glue is not None and index < len(self.glue.steps):
            yield between(f"guidance, {here}", step.noise, self.glue.steps[index].noise)
        with float64():
            scheduler = self.b.scheduler()
            scheduler.set_timesteps(self.case.steps)
            previous = scheduler.step(step.noise, step.timestep, step.sample)[0]
        yield between(f"latents, {here}", step.previous, previous)

    def unet_inputs(self, index: int, here: str) -> Iterator[Rung]:
        if self.glue is None or index >= len(self.glue.unet):
            return
        call, there = self.a64.unet[index], self.glue.unet[index]
        rows = matching_rows((there.latents, there.context), (call.latents, call.context))
        for what in ("latents", "context"):
            mine, theirs, name = getattr(call, what), getattr(there, what), f"UNet {what}, {here}"
            yield between(name, mine[rows], theirs) if len(rows) == len(mine) else exact(name, mine, theirs)

    def decoding(self) -> Iterator[Rung | Stage]:
        """From the last latents to bytes."""
        z, images = self.a64.z, self.a64.images
        assert z is not None and images is not None  # A ran to its end
        if self.glue is not None and self.glue.z is not None:
            change = self.glue.steps[-1].previous / self.a64.steps[-1].previous  # all ones, if B's steps are A's
            yield between("VAE input", z * change, self.glue.z)
        yield Stage("VAE decode", "vae", lambda side: {"images": side.decode(z[:1])})
        rung = exact("pixels", self.a.pixels(images.float()), self.b.pixels(images.float()))
        if self.a_run.images is not None and self.b_run is not None and self.b_run.images is not None:
            whole = self.a.pixels(self.a_run.images.float()), self.b.pixels(self.b_run.images.float())
            gaps = (whole[0].int() - whole[1].int()).abs()
            told = f"{int((gaps > 0).sum()):,} of {gaps.numel():,} bytes differ, by {int(gaps.max())} at most"
            rung.note = rung.note or f"after the whole run {told}"
        yield rung

    def probes(self) -> Iterator[Stage]:
        """What a run from text does not reach: the small scale, where epsilons show, and the encoder."""
        call, z, images = self.a64.unet[0], self.a64.z, self.case.images().double()
        assert z is not None
        small, last = f"at noise {SMALL_SCALE:g}", self.a64.unet[-1].timestep
        yield Stage(
            f"UNet {small}",
            "unet",
            lambda side: {"noise": side.predict(call.latents * SMALL_SCALE, last, call.context)},
        )
        yield Stage(f"VAE decode {small}", "vae", lambda side: {"images": side.decode(z[:1] * SMALL_SCALE)})
        yield Stage("VAE encode", "vae", lambda side: side.encode(images))
        yield Stage(f"VAE encode {small}", "vae", lambda side: side.encode(images * SMALL_SCALE))

    @torch.no_grad()
    def moments(self) -> Rung:
        """The Gaussian that the encoder's output becomes, where it is too large: the log variance is clamped."""
        channels = 2 * self.a.config.vae.latent_channels
        large = 100 * torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(0)).double()
        mine, theirs = (gaussian_of(side, large) for side in (self.a, self.b))
        rungs = {name: between("VAE moments", mine[name], theirs[name]) for name in mine}
        found = max(rungs.values(), key=lambda rung: rung.relative64 or 0.0)
        names = " and ".join(name for name, rung in rungs.items() if rung.status == DIFFERENT)
        found.note = ": ".join(filter(None, [names, found.note]))
        return found

    # How far the whole runs come apart.

    def write_whole_runs(self, rungs: list[Rung]) -> None:
        """A's rounding and B's distance from A64, as they grow from rung to rung, each in its own whole run."""
        for rung in rungs:
            a64, a = (found(rung.name, run, self.a64) for run in (self.a64, self.a_run))
            if a64 is None or a is None:
                continue
            b = found(rung.name, self.b_run, self.a64) if self.b_run is not None else None
            size = largest(a64)
            rung.floor = max(distance(a64, a) / size, torch.finfo(a.dtype).eps / 2)
            rung.error = distance(a64, b) / size if b is not None else float("nan")
            rung.r64 = rung.error / rung.floor


def between(name: str, right: Tensor, wrong: Tensor) -> Rung:
    """A rung between networks, both sides in float64."""
    return rung_of(Observation(name, right, None, wrong, None))


def visited(run: Trajectory) -> Tensor:
    """The timesteps of a run, (N,)."""
    return torch.tensor([int(call.timestep.flatten()[0]) for call in run.unet])


def gaussian_of(side: PipelineSide, moments: Tensor) -> dict[str, Tensor]:
    """What a side's VAE makes of an encoder's output, in float64."""
    network = side.networks["vae"]
    paths = {name: path for path, name in network.canonical.items()}
    with float64(), Listener() as listener:
        for name in ("encoder", "quant_conv"):
            part = network.root.get_submodule(paths[name])
            listener.around(part, "forward", lambda _: lambda *args, **kwargs: moments)
        return side.encode(torch.zeros(1, 3, 4 * side.factor, 4 * side.factor, dtype=torch.float64))


def found(name: str, run: Trajectory, truth: Trajectory) -> Tensor | None:
    """The tensor that a run had at a rung, in the truth's order of rows."""
    what, _, step = name.partition(", step ")
    if what == "text embedding":
        rows = [run.embedding_of(row) for row in torch.cat(truth.tokens)]
        return None if any(row is None for row in rows) else torch.stack(rows)  # type: ignore[arg-type]
    if what == "VAE decode":
        return run.images
    if not step or int(step) >= min(len(run.unet), len(run.steps)):
        return None
    index = int(step)
    if what == "UNet":
        return run.noise_for(index, truth.unet[index].latents, truth.unet[index].context)
    return {"guidance": run.steps[index].noise, "latents": run.steps[index].previous}.get(what)
