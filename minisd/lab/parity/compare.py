"""The comparison from end to end: two sides and a case -> a verdict.

verdict = compare("diffusers:weights/emoji", "minisd:weights/emoji")
"""

import platform
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, cast

import torch

from minisd.checkpoint.keymap import COMPONENTS
from minisd.lab.parity import ladder
from minisd.lab.parity.cases import Case
from minisd.lab.parity.ladder import Runs, Stage
from minisd.lab.parity.modules import pair_of, working
from minisd.lab.parity.pairing import Network, pair_networks, resolve
from minisd.lab.parity.promote import float64
from minisd.lab.parity.shadow import Loan, Measure, Observer, Shadow, apart, copied, one_line
from minisd.lab.parity.sides import PipelineSide
from minisd.lab.parity.telling import conclude, count
from minisd.lab.parity.verdict import DIFFERENT, Matrix, Rung, Verdict

Progress = Callable[[str], None]


def compare_pipelines(
    a: PipelineSide,
    b: PipelineSide,
    case: Case,
    *,
    components: Collection[str] = COMPONENTS,
    observe: Observer | None = None,
    progress: Progress = lambda _: None,
) -> Verdict:
    """Compare two whole models: all that stands between the networks, and the networks named in `components`.

    `observe` is given every tensor that is compared; `progress` the rung at work.
    """
    started = time.perf_counter()
    progress("the loops")
    runs = ladder.run_loops(a, b, case)
    shadows = {component: shadow_of(a, b, component, observe) for component in a.networks if component in components}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "invalid value encountered in cast", RuntimeWarning)  # NaN as pixels
        rungs = list(climbed(a, b, case, runs, shadows, progress))
    if runs.trouble:
        alone = not any(rung.culprit for rung in rungs)
        rungs.append(Rung("B's loop", "glue", DIFFERENT, culprit=alone, note=runs.trouble))
    add_whole_runs(rungs, runs)
    progress("dtypes and attributes")
    for component, shadow in shadows.items():
        run = component_inputs(component, runs)
        roots = a.networks[component].root, b.networks[component].root
        shadow.add_dtypes(roots, (partial(run, a, shadow.working[0]), partial(run, b, shadow.working[1])))
        shadow.mark_culprits()
    only_first_causes(rungs, shadows)
    tell_settings(a, b, rungs)
    verdict = conclude(a.name, b.name, rungs, [pair for shadow in shadows.values() for pair in shadow.pairs.values()])
    verdict.matrix = matrix_of(shadows["unet"]) if "unet" in shadows else Matrix()
    verdict.not_compared = [*verdict.not_compared, *not_compared(a, b, case, shadows)]
    verdict.case, verdict.versions = case.as_dict(), {**versions(), **a.versions(), **b.versions()}
    verdict.seconds = time.perf_counter() - started
    images = [run.images for run in (runs.a64, runs.a, runs.b) if run is not None and run.images is not None]
    if observe is not None and len(images) == 3:
        observe("pixels", "whole run", images[0], images[1], images[2], images[2])
    return verdict


def climbed(
    a: PipelineSide, b: PipelineSide, case: Case, runs: Runs, shadows: dict[str, Shadow], progress: Progress
) -> Iterator[Rung]:
    """Every rung, measured, but those of networks that have no shadow."""
    for item in ladder.climb(a, b, case, runs):
        if not isinstance(item, Stage):
            yield item
        elif item.component in shadows:
            progress(item.rung)
            yield network_rung(a, b, item, shadows[item.component])


def compare_part(
    live: PipelineSide, part: Any, case: Case, *, observe: Observer | None = None, progress: Progress = lambda _: None
) -> Verdict:
    """Compare a module of somebody's own with its twin in a live model, which gives it its inputs.

    `part` has a `module` and `names`, its own paths -> names in any dialect. The live model is the reference, A.
    """
    started = time.perf_counter()
    component, network = network_of(live, part)
    shadow = shadow_of_networks(live.networks[component], network, observe)
    shadow.alone = True
    progress("the loop")
    with float64():
        run = live.trajectory(case, case.latents(live.config.vae.latent_channels, live.factor).double())
    for stage in ladder.stages(live, case, run):
        if stage.component == component:
            progress(stage.rung)
            shadow.replay(stage.rung, partial(stage.run, guarded(live)), lambda: None)
    shadow.mark_culprits()
    if not any(pair.calls for pair in shadow.pairs.values()):
        notes = {pair.note for pair in shadow.pairs.values() if pair.note}
        raise ValueError(f"{part.name}: nothing could be compared: {'; '.join(sorted(notes)) or 'it is never reached'}")
    verdict = conclude(live.name, part.name, [], list(shadow.pairs.values()))
    verdict.matrix = matrix_of(shadow)
    verdict.not_compared = ["everything outside of the part, its gradients, the dtypes it computes in"]
    verdict.case, verdict.versions = case.as_dict(), {**versions(), **live.versions()}
    verdict.seconds = time.perf_counter() - started
    return verdict


def network_of(live: PipelineSide, part: Any) -> tuple[str, Network]:
    """Which component a part belongs to. Raises ValueError for a name that no component has."""
    for component, network in live.networks.items():
        try:
            resolve(component, network.config, part.names[""])
        except ValueError:
            continue
        return component, Network(component, part.module, network.config, modules=part.names)
    raise ValueError(f"{part.name}: no module is called {part.names['']!r} (see `minisd taps --list`)")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "machine": platform.machine(), "threads": str(torch.get_num_threads())}


WHOLES = ("vae.decoder", "vae.encoder")  # a VAE is not called as a whole


# ---- networks --------------------------------------------------------------------------------------------


def shadow_of(a: PipelineSide, b: PipelineSide, component: str, observe: Observer | None) -> Shadow:
    """Twins, what differs between them at rest, and what has to be lent so that rounded weights do not count."""
    return shadow_of_networks(a.networks[component], b.networks[component], observe)


def shadow_of_networks(one: Network, other: Network, observe: Observer | None) -> Shadow:
    twins = pair_networks(one, other)
    pairs = {twin.name: pair_of(twin) for twin in twins}
    return Shadow(twins, pairs, (working(one.root), working(other.root)), observe, loan=Loan.between(twins, pairs))


def guarded(side: PipelineSide) -> PipelineSide:
    """A side that is given copies: what it writes into its inputs must not reach the other side."""
    return cast(PipelineSide, Guarded(side))


class Guarded:
    """What `guarded` returns: every method of the side, called with copies."""

    def __init__(self, side: PipelineSide) -> None:
        self.side = side

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.side, name)
        return (lambda *args, **kwargs: value(*copied(args), **copied(kwargs))) if callable(value) else value


def network_rung(a: PipelineSide, b: PipelineSide, stage: Stage, shadow: Shadow) -> Rung:
    """Replay a stage; what the component as a whole says is the rung."""
    rung = Rung(stage.rung, "network")
    said_a, said_b = shadow.replay(stage.rung, partial(stage.run, guarded(a)), partial(stage.run, guarded(b)))
    if isinstance(said_b, Exception):
        rung.status, rung.relative64, rung.note = DIFFERENT, float("inf"), f"B fails: {one_line(said_b)}"
        return rung
    found = [apart(said_a[name], said_b[name]) for name in said_a]
    worst: Measure = max(found, key=lambda one: one.relative64 / one.limit)
    rung.relative64, rung.limit, rung.absmax = worst.relative64, worst.limit, worst.absmax
    rung.status = shadow.status_of(stage.rung, worst)
    for name in (stage.component, *WHOLES):
        whole = shadow.cells.get((stage.rung, name))
        if whole is not None:
            rung.floor, rung.error, rung.r64 = whole.floor, whole.error, whole.r64
            break
    return rung


def add_whole_runs(rungs: list[Rung], runs: Runs) -> None:
    """A's rounding and B's distance, as they grow from rung to rung."""
    for rung in rungs:
        pair = ladder.whole_run(rung.name, runs)
        if pair is not None:
            rung.floor, rung.error = pair
            rung.r64 = rung.error / rung.floor


def component_inputs(component: str, runs: Runs) -> Callable[[PipelineSide, torch.dtype], Any]:
    """One run of a component in a side's own precision."""
    call, z = runs.a64.unet[0], runs.a64.z
    assert z is not None

    def run(side: PipelineSide, dtype: torch.dtype) -> Any:
        if component == "unet":
            return side.predict(call.latents.to(dtype), call.timestep, call.context.to(dtype))
        if component == "vae":
            images = torch.zeros(1, 3, 8 * side.factor, 8 * side.factor, dtype=dtype)
            return side.decode(z[:1].to(dtype)), side.encode(images)
        return side.embed(runs.a64.tokens[0])

    return run


# ---- the whole -------------------------------------------------------------------------------------------


def only_first_causes(rungs: list[Rung], shadows: dict[str, Shadow]) -> None:
    """Which rungs are culprits: those that differ though nothing that they are made from does."""
    guilty = {name for name, shadow in shadows.items() if any(pair.culprit for pair in shadow.pairs.values())}
    components = {"text": "text_encoder", "UNet": "unet", "VAE": "vae"}
    levels = any(rung.culprit for rung in rungs if rung.name in ("alphas", "final alpha"))
    loop = False  # did the loop go wrong before?
    for rung in rungs:
        what = rung.name.split(",")[0]
        if rung.kind == "network" and rung.status == DIFFERENT:
            rung.culprit = components[what.split()[0]] not in guilty
        elif (what == "latents" and levels) or (what in ("UNet latents", "UNet context") and loop):
            rung.culprit = False
        loop |= what in ("tokens", "timesteps", "alphas", "final alpha", "guidance", "latents") and (
            rung.status == DIFFERENT
        )


SCHEDULED = ("timesteps", "alphas", "final alpha", "latents")


def tell_settings(a: PipelineSide, b: PipelineSide, rungs: list[Rung]) -> None:
    """Where the schedule is the culprit: which of its settings are not the same."""
    mine, theirs = (dict(side.scheduler().config) for side in (a, b))
    said = [
        f"{name} {mine[name]!r} (A), {theirs[name]!r} (B)"
        for name in mine.keys() & theirs.keys()
        if not name.startswith("_") and mine[name] != theirs[name]
    ]
    for rung in rungs:
        if rung.culprit and rung.name.split(",")[0] in SCHEDULED and said:
            rung.note = "; ".join([*sorted(said), rung.note] if rung.note else sorted(said))


def matrix_of(shadow: Shadow) -> Matrix:
    """Steps x blocks of the UNet: pairs that hold a resnet or a transformer, and the ends."""
    stages = list(dict.fromkeys(stage for stage, _ in shadow.cells))
    blocks = [name for name in shadow.pairs if is_block(name) and any((s, name) in shadow.cells for s in stages)]

    def table(value: Callable[[Measure], float]) -> list[list[float | None]]:
        return [
            [value(shadow.cells[stage, name]) if (stage, name) in shadow.cells else None for name in blocks]
            for stage in stages
        ]

    return Matrix(stages, blocks, table(lambda one: one.r64), table(lambda one: one.relative64))


def is_block(name: str) -> bool:
    """unet.down.0.resnet, unet.up.3.attention, unet.conv_in, ...: the stations of the flat UNet."""
    parts = name.split(".")
    return len(parts) == 2 or parts[-1] in ("resnet", "attention", "downsample", "upsample")


def not_compared(a: PipelineSide, b: PipelineSide, case: Case, shadows: dict[str, Shadow]) -> list[str]:
    """What this verdict does not speak of."""
    size = f"{case.width}x{case.height}"
    told = [f"{count(len(case.prompts), 'prompt')} at {size}, {case.steps} steps: no other size, prompt or seed"]
    told.append("schedulers other than the model's own, eta above 0, image-to-image, gradients")
    told += [f"the {component}" for component in COMPONENTS if component not in shadows]
    for shadow in shadows.values():
        silent = [pair for pair in shadow.pairs.values() if pair.calls == 0 and pair.note and pair.status != DIFFERENT]
        told += [f"{pair.name}: {pair.note}" for pair in silent]
    return told
