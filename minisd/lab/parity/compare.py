"""The comparison from end to end: two sides and a case -> a verdict.

Two whole models, a part beside its counterpart in a model, a trace beside a model, or two modules without any model:
the same replay and the same judge. Next: `ladder.py`.
"""

import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import torch
from torch import nn

from minisd.checkpoint.keymap import COMPONENTS
from minisd.lab.parity.calls import copied, in_dtype, one_line
from minisd.lab.parity.cases import Case
from minisd.lab.parity.conclude import conclude, count
from minisd.lab.parity.judge import Measure, Observer, mark_first_causes
from minisd.lab.parity.ladder import Climb, Stage
from minisd.lab.parity.memory import check_memory
from minisd.lab.parity.opening import FunctionSide, PartSide, foreign, open_side
from minisd.lab.parity.pairing import Network, as_module, pair_modules, pair_networks, resolve, same_weights
from minisd.lab.parity.promote import float64, widened
from minisd.lab.parity.replay import Replay, dtype_of
from minisd.lab.parity.retrace import compare_with_trace, is_result
from minisd.lab.parity.sides import PipelineSide, Side, check_shapes
from minisd.lab.parity.traces import TraceSide, inputs_of
from minisd.lab.parity.verdict import DIFFERENT, Matrix, ModulePair, Rung, Verdict

Progress = Callable[[str], None]


def compare(
    a: str | Side,
    b: str | Side,
    case: Case | Mapping[str, Any] | None = None,
    *,
    observe: Observer | None = None,
    progress: Progress = lambda _: None,
) -> Verdict:
    """Compare two sides. `case`: a `Case`, or the numbers of one that are not to be the default; a trace has its own.

    `observe` is given every tensor that is compared, `progress` what is at work. Raises ValueError for sides that
    cannot be compared, MemoryError (before anything is computed) where the machine is too small.
    """
    one, other = (open_side(side) if isinstance(side, str) else side for side in (a, b))
    verdict = dispatch(one, other, case, observe, progress)
    verdict.command = command_for(one, other, verdict)
    return verdict


def dispatch(one: Side, other: Side, case: Any, observe: Observer | None, progress: Progress) -> Verdict:
    """The comparison that fits two sides."""
    if isinstance(one, PipelineSide) and isinstance(other, PipelineSide):
        check_shapes(one, other)
        fitting = case_for(one, case)
        check_memory(one, other, fitting)
        return compare_pipelines(one, other, fitting, observe=observe, progress=progress)
    live = next((side for side in (one, other) if isinstance(side, PipelineSide)), None)
    if live is None:
        raise ValueError(f"{one.name} and {other.name}: one of the two must be minisd:PATH or diffusers:PATH")
    guest = other if live is one else one
    if isinstance(guest, TraceSide):
        return compare_with_trace(guest, live, trace_is_a=guest is one)
    if isinstance(guest, FunctionSide):
        return compare_with_trace(called(guest, live, case_for(live, case)), live, trace_is_a=guest is one)
    assert isinstance(guest, PartSide)
    with redirect_stdout(sys.stderr):
        try:
            return compare_part(live, guest, case_for(live, case), observe=observe, progress=progress)
        except (SystemExit, ArithmeticError, OSError) as error:  # others it counts as findings
            raise ValueError(f"{guest.name}: ends with {type(error).__name__} ({one_line(error)})") from None


def case_for(side: PipelineSide, case: Case | Mapping[str, Any] | None) -> Case:
    """The case that was given, or one of a size that fits the model."""
    if isinstance(case, Case):
        return case
    return Case.fitting(min(side.config.unet.own_size), side.factor, **(case or {}))


def command_for(a: Side, b: Side, verdict: Verdict) -> str:
    """What to type to see this again."""
    words, default = ["minisd", "parity", a.name, b.name], Case().as_dict()
    if isinstance(a, TraceSide) or isinstance(b, TraceSide):
        return shlex.join(words)  # a trace has its own case
    for name in ("steps", "guidance", "seed"):
        if verdict.case.get(name, default[name]) != default[name]:
            words += [f"--{name}", f"{verdict.case[name]:g}"]
    if verdict.case:
        words += ["--size", f"{verdict.case['width']}x{verdict.case['height']}"]
        for name, option in (("prompts", "--prompt"), ("negatives", "--negative")):
            if verdict.case[name] != default[name]:
                words += [word for text in verdict.case[name] for word in (option, text)]
    return shlex.join(words)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "machine": platform.machine(), "threads": str(torch.get_num_threads())}


# ---- two whole models ------------------------------------------------------------------------------------

WHOLES = ("vae.decoder", "vae.encoder")  # a VAE is not called as a whole


def compare_pipelines(
    a: PipelineSide,
    b: PipelineSide,
    case: Case,
    *,
    components: Collection[str] = COMPONENTS,
    observe: Observer | None = None,
    progress: Progress = lambda _: None,
) -> Verdict:
    """Compare two whole models: all that is computed between the networks, and the networks named in `components`.

    `observe` is given every tensor that is compared; `progress` the rung at work.
    """
    started = time.perf_counter()
    progress("the loops")
    climb = Climb.of(a, b, case)
    replays = {
        component: replay_of(a.networks[component], b.networks[component], observe)
        for component in a.networks
        if component in components
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "invalid value encountered in cast", RuntimeWarning)  # NaN as pixels
        rungs = list(climbed(climb, replays, progress))
    if climb.trouble:
        first = not any(rung.culprit for rung in rungs)
        rungs.append(Rung("B's loop", "glue", status=DIFFERENT, culprit=first, note=climb.trouble))
    climb.write_whole_runs(rungs)
    progress("dtypes and attributes")
    for component, replay in replays.items():
        replay.add_dtypes(*(component_run(component, climb, side) for side in (a, b)))
        replay.judge.mark_culprits()
    pairs = {component: list(replay.judge.pairs.values()) for component, replay in replays.items()}
    mark_first_causes(rungs, {component for component, found in pairs.items() if any(pair.culprit for pair in found)})
    tell_settings(a, b, rungs)
    verdict = conclude(a.name, b.name, rungs, [pair for found in pairs.values() for pair in found])
    verdict.matrix = matrix_of(replays["unet"]) if "unet" in replays else Matrix()
    verdict.not_compared = not_compared(case, replays)
    verdict.case, verdict.versions = case.as_dict(), {**versions(), **a.versions(), **b.versions()}
    verdict.seconds = time.perf_counter() - started
    show_images(climb, observe)
    return verdict


def climbed(climb: Climb, replays: dict[str, Replay], progress: Progress) -> Iterator[Rung]:
    """Every rung, measured, but those of networks that are not compared."""
    for item in climb.rungs():
        if not isinstance(item, Stage):
            yield item
        elif item.component in replays:
            progress(item.rung)
            runs = partial(run_stage, item, climb.a), partial(run_stage, item, climb.b)
            yield replays[item.component].rung(item.rung, runs, (item.component, *WHOLES))


def run_stage(stage: Stage, side: PipelineSide) -> dict[str, Any]:
    """Run a stage on copies: what a side writes into its inputs must not reach the other side."""
    return stage.run(Guarded(side))  # type: ignore[arg-type]


class Guarded:
    """A side whose methods are called with copies of their arguments."""

    def __init__(self, side: PipelineSide) -> None:
        self.side = side

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.side, name)
        return (lambda *args, **kwargs: value(*copied(args), **copied(kwargs))) if callable(value) else value


def replay_of(one: Network, other: Network, observe: Observer | None, *, alone: bool = False) -> Replay:
    return Replay((one.root, other.root), pair_networks(one, other), observe, alone=alone)


def component_run(component: str, climb: Climb, side: PipelineSide) -> Callable[[], Any]:
    """One run of a component in a side's own precision."""
    dtype, call, z = dtype_of(side.networks[component].root), climb.a64.unet[0], climb.a64.z
    assert z is not None
    size = 8 * side.factor
    runs: dict[str, Callable[[], Any]] = {
        "unet": lambda: side.predict(call.latents.to(dtype), call.timestep, call.context.to(dtype)),
        "vae": lambda: (side.decode(z[:1].to(dtype)), side.encode(torch.zeros(1, 3, size, size, dtype=dtype))),
        "text_encoder": lambda: side.embed(climb.a64.tokens[0]),
    }
    return runs[component]


def show_images(climb: Climb, observe: Observer | None) -> None:
    """Give the observer the images of the whole runs."""
    runs = (climb.a64, climb.a_run, climb.b_run)
    images = [run.images for run in runs if run is not None and run.images is not None]
    if observe is not None and len(images) == 3:
        observe("pixels", "whole run", images[0], images[1], images[2], images[2])


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


def matrix_of(replay: Replay) -> Matrix:
    """Steps x blocks of the UNet: pairs that hold a resnet or a transformer, and the ends."""
    cells = replay.judge.cells
    stages = list(dict.fromkeys(stage for stage, _ in cells))
    blocks = [name for name in replay.judge.pairs if is_block(name) and any((s, name) in cells for s in stages)]

    def table(value: Callable[[Measure], float | None]) -> list[list[float | None]]:
        return [[value(cells[stage, name]) if (stage, name) in cells else None for name in blocks] for stage in stages]

    return Matrix(stages, blocks, table(lambda one: one.r64), table(lambda one: one.relative64))


def is_block(name: str) -> bool:
    """unet.down.0.resnet, unet.up.3.attention, unet.conv_in, ...: the entries of the flat block list."""
    parts = name.split(".")
    return len(parts) == 2 or parts[-1] in ("resnet", "attention", "downsample", "upsample")


def not_compared(case: Case, replays: dict[str, Replay]) -> list[str]:
    """What this verdict does not speak of."""
    size = f"{case.width}x{case.height}"
    told = [f"{count(len(case.prompts), 'prompt')} at {size}, {case.steps} steps: no other size, prompt or seed"]
    told.append("schedulers other than the model's own, eta above 0, image-to-image, gradients")
    told += [f"the {component}" for component in COMPONENTS if component not in replays]
    pairs = [pair for replay in replays.values() for pair in replay.judge.pairs.values()]
    silent = [pair for pair in pairs if pair.calls == 0 and pair.note and pair.status != DIFFERENT]
    return told + [f"{pair.name}: {pair.note}" for pair in silent]


# ---- a part, or a function, beside a model ---------------------------------------------------------------


def compare_part(
    live: PipelineSide,
    part: PartSide,
    case: Case,
    *,
    observe: Observer | None = None,
    progress: Progress = lambda _: None,
) -> Verdict:
    """Compare a user's own module with its counterpart in a live model, which is the reference, A.

    The modules inside it are paired by `part.names`, and where those say nothing by their weights.
    """
    started = time.perf_counter()
    network = network_of(live, part)
    reference = live.networks[network.component]
    replay = replay_of(reference, network, observe, alone=True)
    progress("the loop")
    climb = Climb.alone(live, case)
    for stage in climb.rungs():
        if isinstance(stage, Stage) and stage.component == network.component:
            progress(stage.rung)
            replay.replay(stage.rung, partial(run_stage, stage, live), lambda: None)
    replay.judge.mark_culprits()
    pairs = well_paired(replay, part)
    if not any(pair.calls for pair in pairs):
        notes = {pair.note for pair in pairs if pair.note}
        raise ValueError(f"{part.name}: nothing could be compared: {'; '.join(sorted(notes)) or 'it is never reached'}")
    verdict = conclude(live.name, part.name, [], pairs)
    verdict.compared += paired_how(network, part)
    verdict.matrix = matrix_of(replay)
    verdict.not_compared = ["everything outside of the part, its gradients, the dtypes it computes in"]
    verdict.not_compared += [f"{pair.name}: {pair.note}" for pair in pairs if pair.calls == 0 and pair.note]
    verdict.case, verdict.versions = case.as_dict(), {**versions(), **live.versions()}
    verdict.seconds = time.perf_counter() - started
    return verdict


def well_paired(replay: Replay, part: PartSide) -> list[ModulePair]:
    """All pairs; but where the whole is the same, none that weights alone made and that differs.

    A function may be computed another way, with a factor inside a weight: then such modules are no counterparts.
    """
    pairs = list(replay.judge.pairs.values())
    whole = next((pair for pair in pairs if pair.b == ""), None)
    if whole is None or whole.status == DIFFERENT or not whole.calls:
        return pairs
    return [pair for pair in pairs if pair.b in part.names or pair.status != DIFFERENT]


def network_of(live: PipelineSide, part: PartSide) -> Network:
    """A part as a network of the component that it belongs to. Raises ValueError for a name that none has."""
    for component, reference in live.networks.items():
        try:
            place = resolve(component, reference.config, part.names[""])
        except ValueError:
            continue
        weights = same_weights(reference, place, part.module)
        return Network(component, part.module, reference.config, weights, part.names)
    raise ValueError(f"{part.name}: no module is called {part.names['']!r} (see `minisd taps --list`)")


def paired_how(network: Network, part: PartSide) -> str:
    """How the modules inside a part were paired."""
    inside = len(network.canonical) - len(part.names)
    if inside > 0:
        return f"; {count(inside, 'module')} inside it paired by their weights"
    alone = len(part.names) == 1 and any(True for _ in part.module.children())
    return "; no module inside it has the weights of one in the reference: name them in a name map" if alone else ""


def called(side: FunctionSide, live: PipelineSide, case: Case) -> TraceSide:
    """What a function returns, in the live side's precision and in float64, as a trace.

    Raises ValueError if it fails.
    """
    inputs = inputs_of(live, case)
    working = in_dtype(inputs, live.dtype)
    with foreign(f"{side.name}: fails; it was given {', '.join(sorted(inputs)[:5])} ..."):
        told = side.function(working)
        with float64():
            exactly = side.function(inputs)
    check_answer(side, told)
    check_answer(side, exactly)
    if not any(is_result(name) for name in told):
        raise ValueError(f"{side.name}: none of the names it returns ({', '.join(sorted(told)[:4])}) is one of a trace")
    wide = {name: tensor for name, tensor in exactly.items() if tensor.dtype == torch.float64}
    return TraceSide(side.name, case, {**working, **told}, {**inputs, **wide} if wide else {})


def check_answer(side: FunctionSide, told: Any) -> None:
    """Raise ValueError for anything but tensors by name."""
    must = "must be a dict from names, as in a trace, to torch tensors"
    if not isinstance(told, Mapping):
        raise ValueError(f"{side.name}: returns a {type(told).__name__}; {must}")
    for name, value in told.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{side.name}: returns a {type(value).__name__} as {name!r}; {must}")


# ---- two modules without a model -------------------------------------------------------------------------


def compare_modules(
    a: Callable[..., Any],
    b: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    *,
    names: Mapping[str, str] | None = None,
    titles: tuple[str, str] = ("A", "B"),
    observe: Observer | None = None,
) -> Verdict:
    """Is `b` the same function as the reference `a` on all of `inputs` (positional arguments, one tuple a call)?

    `names`: path of a module in B -> its counterpart's path in A; without it, modules at the same path are paired.
    Inputs are given to each in float64 and in its own precision. Raises ValueError where there is no input, no output,
    or no module of a name.
    """
    if not inputs:
        raise ValueError("compare_modules needs at least one tuple of inputs")
    started = time.perf_counter()
    one, other = as_module(a), as_module(b)
    replay = Replay((one, other), pair_modules(one, other, names, titles), observe, exact=True)
    rungs = []
    for index, arguments in enumerate(inputs):
        wide = widened(tuple(arguments))
        runs = partial(call_copied, one, wide), partial(call_copied, other, wide)
        rungs.append(replay.rung(f"call {index}", runs, ("(whole)",)))
    replay.add_dtypes(*(partial(module, *in_dtype(inputs[0], dtype_of(module))) for module in (one, other)))
    replay.judge.mark_culprits()
    verdict = conclude(*titles, rungs, list(replay.judge.pairs.values()))
    verdict.not_compared = ["inputs other than those given", "gradients"]
    verdict.versions, verdict.seconds = {"torch": torch.__version__}, time.perf_counter() - started
    return verdict


def call_copied(module: nn.Module, arguments: tuple[Any, ...]) -> Any:
    return module(*copied(arguments))
