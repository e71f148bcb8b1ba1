"""The ladder from the prompt to the pixels: what stands between the networks, with the networks out of the way.

B's own loop is run on A's answers: text encoder, UNet and VAE are not computed, they say what A's said. Whatever still
differs is B's glue: its tokenizer, timesteps, guidance, scheduler or scaling. Each rung gets what A's had, so that an
early mistake does not make the later rungs look wrong. In: two pipelines and a case. Out: rungs, in order.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minisd.lab.parity.cases import SMALL_SCALE, Case
from minisd.lab.parity.promote import float64
from minisd.lab.parity.resemblance import describe
from minisd.lab.parity.shadow import FAILURES, apart, distance, one_line
from minisd.lab.parity.sides import TABLES, PipelineSide, Trajectory, matching_rows, replaced
from minisd.lab.parity.verdict import DIFFERENT, PRECISION, SAME, Rung


@dataclass
class Stage:
    """A component at work on inputs that both sides get: a rung, and what the shadow replay runs."""

    rung: str
    component: str
    run: Callable[[PipelineSide], dict[str, Tensor]]


@dataclass
class Runs:
    """The loop, four times: A in float64 (the truth), A and B as they are, and B's glue on A's answers."""

    a64: Trajectory
    a: Trajectory
    b: Trajectory | None
    glue: Trajectory | None
    trouble: str = ""  # why B's loop did not come to its end


def run_loops(a: PipelineSide, b: PipelineSide, case: Case) -> Runs:
    """Raises whatever A raises: a reference that does not run is none. B may fail."""
    latents = case.latents(a.config.vae.latent_channels, a.factor)
    with float64():
        a64 = a.trajectory(case, latents.double())
    runs = Runs(a64, a.trajectory(case, latents.to(a.dtype, copy=True)), None, None)
    try:
        with float64():
            runs.glue = b.trajectory(case, latents.double(), playback=a64)
        runs.b = b.trajectory(case, latents.to(b.dtype, copy=True))
    except FAILURES as error:
        runs.trouble = f"B's loop fails: {one_line(error)}"
    return runs


def climb(a: PipelineSide, b: PipelineSide, case: Case, runs: Runs) -> Iterator[Rung | Stage]:
    """Every rung in order. A `Stage` is a network's rung, which is not measured here."""
    texts = [*case.prompts, *case.negatives]
    yield exact("tokens", a.tokens(texts), b.tokens(texts))
    ids = torch.cat(runs.a64.tokens)
    yield Stage("text embedding", "text_encoder", lambda side: {"context": side.embed(ids)})
    yield initial_noise(a, b, case)
    yield from schedule(a, b, case, runs)
    for index, call in enumerate(runs.a64.unet):
        yield from one_step(a, b, case, runs, index, call)
    yield from decoding(a, b, runs)
    yield from probes(a, case, runs)
    yield moments(a, b)


def stages(live: PipelineSide, case: Case, run: Trajectory) -> Iterator[Stage]:
    """The networks' rungs of one side's run, for a part that has no loop of its own."""
    for item in climb(live, live, case, Runs(run, run, None, None)):
        if isinstance(item, Stage):
            yield item


def initial_noise(a: PipelineSide, b: PipelineSide, case: Case) -> Rung:
    """What each draws from the same seed. In two precisions they are the same numbers, up to the coarser's rounding."""
    drawn = a.drawn(case), b.drawn(case)
    coarser = max((tensor.dtype for tensor in drawn), key=lambda dtype: torch.finfo(dtype).eps)
    return exact("initial noise", *(tensor.to(coarser).float() for tensor in drawn))


def exact(name: str, one: Tensor, other: Tensor) -> Rung:
    """Whole numbers, or numbers that nobody computes: equal or not."""
    if one.shape != other.shape:
        said = f"{tuple(one.shape)} in A, {tuple(other.shape)} in B"
        return Rung(name, "exact", DIFFERENT, culprit=True, note=said)
    off = (one != other).flatten()
    count = int(off.sum())
    if not count:
        return Rung(name, "exact", SAME, absmax=0.0)
    at = int(off.nonzero()[0])
    values = f"{one.flatten()[at].item()} in A, {other.flatten()[at].item()} in B"
    return Rung(
        name, "exact", DIFFERENT, absmax=float(count), culprit=True, note=f"{count:,} differ, the first: {values}"
    )


def glue(name: str, right: Tensor, wrong: Tensor, innocent: bool = False) -> Rung:
    """A rung between networks, both in float64. `innocent`: an earlier rung explains it already."""
    found = apart(right, wrong)
    rung = Rung(name, "glue", SAME, found.relative64, found.limit, found.absmax)
    if found.deviates:
        rung.status, rung.culprit = DIFFERENT, not innocent
        rung.note = describe(right, wrong) if right.numel() == wrong.numel() else "another shape"
    return rung


def schedule(a: PipelineSide, b: PipelineSide, case: Case, runs: Runs) -> Iterator[Rung]:
    """The timesteps that the loops visit, and the noise levels."""
    if runs.glue is not None:
        yield exact("timesteps", *(visited(run) for run in (runs.a64, runs.glue)))
    for name, title in zip(TABLES, ("alphas", "final alpha"), strict=True):
        written = [torch.as_tensor(getattr(side.scheduler(), name)) for side in (a, b)]
        with float64():
            exactly = [torch.as_tensor(getattr(side.scheduler(), name)).double() for side in (a, b)]
        yield levels(title, written, exactly)


def visited(run: Trajectory) -> Tensor:
    """The timesteps of a run, (N,)."""
    return torch.tensor([int(call.timestep.flatten()[0]) for call in run.unet])


def levels(title: str, written: list[Tensor], exactly: list[Tensor]) -> Rung:
    """A table of noise levels, as both sides compute it in float64, and as both have it."""
    rung = glue(title, exactly[0], exactly[1])
    if rung.culprit:
        at = int((exactly[0] - exactly[1]).abs().flatten().argmax()) if exactly[0].shape == exactly[1].shape else 0
        rung.note = f"{float(exactly[0].flatten()[at]):.9g} in A, {float(exactly[1].flatten()[at]):.9g} in B"
    elif distance(*written) > 0:
        rung.status = PRECISION
        rung.note = f"rounded otherwise, by {distance(*written):.1e}: computed in another precision and then stored"
    return rung


def one_step(a: PipelineSide, b: PipelineSide, case: Case, runs: Runs, index: int, call: Any) -> Iterator[Rung | Stage]:
    """What goes into the UNet, what it says, guidance, and the scheduler's step."""
    here = f"step {index}"
    there = runs.glue.unet[index] if runs.glue is not None and index < len(runs.glue.unet) else None
    if there is not None:
        rows = matching_rows((there.latents, there.context), (call.latents, call.context))
        for name, mine, theirs in (
            ("UNet latents", call.latents, there.latents),
            ("UNet context", call.context, there.context),
        ):
            if len(rows) == len(mine):
                yield glue(f"{name}, {here}", mine[rows], theirs)
            else:
                yield exact(f"{name}, {here}", mine, theirs)

    def predict(side: PipelineSide) -> dict[str, Tensor]:
        return {"noise": side.predict(call.latents, call.timestep, call.context)}

    yield Stage(f"UNet, {here}", "unet", predict)
    step = runs.a64.steps[index]
    if runs.glue is not None and index < len(runs.glue.steps):
        yield glue(f"guidance, {here}", step.noise, runs.glue.steps[index].noise)
    with float64():
        scheduler = b.scheduler()
        scheduler.set_timesteps(case.steps)
        previous = scheduler.step(step.noise, step.timestep, step.sample)[0]
    yield glue(f"latents, {here}", step.previous, previous)


def decoding(a: PipelineSide, b: PipelineSide, runs: Runs) -> Iterator[Rung | Stage]:
    """From the last latents to bytes."""
    z, images = runs.a64.z, runs.a64.images
    assert z is not None and images is not None  # A ran to its end
    if runs.glue is not None and runs.glue.z is not None:
        change = runs.glue.steps[-1].previous / runs.a64.steps[-1].previous  # all ones, if B's steps are A's
        yield glue("VAE input", z * change, runs.glue.z)
    yield Stage("VAE decode", "vae", lambda side: {"images": side.decode(z[:1])})
    rung = exact("pixels", a.pixels(images.float()), b.pixels(images.float()))
    if runs.a.images is not None and runs.b is not None and runs.b.images is not None:
        gaps = (a.pixels(runs.a.images.float()).int() - b.pixels(runs.b.images.float()).int()).abs()
        told = f"{int((gaps > 0).sum()):,} of {gaps.numel():,} bytes differ, by {int(gaps.max())} at most"
        rung.note = rung.note or f"after the whole run {told}"
    yield rung


def probes(a: PipelineSide, case: Case, runs: Runs) -> Iterator[Stage]:
    """What a run from text does not reach: the small scale, where epsilons show, and the encoder."""
    call, z, images = runs.a64.unet[0], runs.a64.z, case.images().double()
    assert z is not None
    small = f"at noise {SMALL_SCALE:g}"
    last = runs.a64.unet[-1].timestep
    yield Stage(
        f"UNet {small}", "unet", lambda side: {"noise": side.predict(call.latents * SMALL_SCALE, last, call.context)}
    )
    yield Stage(f"VAE decode {small}", "vae", lambda side: {"images": side.decode(z[:1] * SMALL_SCALE)})
    yield Stage("VAE encode", "vae", lambda side: side.encode(images))
    yield Stage(f"VAE encode {small}", "vae", lambda side: side.encode(images * SMALL_SCALE))


@torch.no_grad()
def moments(a: PipelineSide, b: PipelineSide) -> Rung:
    """The Gaussian that the encoder's last numbers become, where they are too large: the log variance is clamped."""
    channels = 2 * a.config.vae.latent_channels
    large = 100 * torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    said = []
    for side in (a, b):
        network = side.networks["vae"]
        paths = {name: path for path, name in network.canonical.items()}
        parts = [network.root.get_submodule(paths[name]) for name in ("encoder", "quant_conv")]
        with (
            float64(),
            replaced(parts[0], "forward", lambda _: lambda *args, **kwargs: large),
            replaced(parts[1], "forward", lambda _: lambda *args, **kwargs: large),
        ):
            said.append(side.encode(torch.zeros(1, 3, 4 * side.factor, 4 * side.factor, dtype=torch.float64)))
    worst = [glue("VAE moments", said[0][name], said[1][name]) for name in said[0]]
    found = max(worst, key=lambda rung: rung.relative64 or 0.0)
    names = [name for name, rung in zip(said[0], worst, strict=True) if rung.status == DIFFERENT]
    if names:
        found.note = f"{' and '.join(names)}: {found.note}" if found.note else " and ".join(names)
    return found


# ---- how far the whole runs come apart --------------------------------------------------------------------


def whole_run(name: str, runs: Runs) -> tuple[float, float] | None:
    """A's and B's distance from A64 at a rung, each from its own whole run, relative; None where there is nothing."""
    triple = [found(name, run, runs.a64) if run is not None else None for run in (runs.a64, runs.a, runs.b)]
    if triple[0] is None or triple[1] is None:
        return None
    size = float(triple[0].abs().max()) or 1.0
    floor = max(distance(triple[0], triple[1]) / size, torch.finfo(triple[1].dtype).eps / 2)
    error = distance(triple[0], triple[2]) / size if triple[2] is not None else float("nan")
    return floor, error


def found(name: str, run: Trajectory, truth: Trajectory) -> Tensor | None:
    """The tensor that a run had at a rung, in the truth's order of rows."""
    what, _, step = name.partition(", step ")
    if what == "text embedding":
        rows = [run.embedding_of(row) for row in torch.cat(truth.tokens)]
        return None if any(row is None for row in rows) else torch.stack(rows)  # type: ignore[arg-type]
    if what == "VAE decode":
        return run.images
    index = int(step) if step else 0
    if not step or index >= min(len(run.unet), len(run.steps)):
        return None
    if what == "UNet":
        mine, right = run.unet[index], truth.unet[index]
        return mine.noise[matching_rows((right.latents, right.context), (mine.latents, mine.context))]
    return {"guidance": run.steps[index].noise, "latents": run.steps[index].previous}.get(what)
