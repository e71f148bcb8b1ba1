"""A trace against a live model: every tensor of the trace is computed again, from the trace's own inputs.

The live side is the truth: it is run in float64, and in its working precision, which gives the rounding error that is
to be expected. A tensor in float64 is judged by the rule. One in float32 is not: R64 says how many times the expected
rounding it is away, and where to look; a trace that has such tensors can prove a difference, never sameness.

In: a `TraceSide` and a `PipelineSide`. Out: a `Verdict`.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minisd.checkpoint.keymap import COMPONENTS
from minisd.lab.parity.ladder import exact
from minisd.lab.parity.pairing import Network, resolve
from minisd.lab.parity.promote import float64, widened
from minisd.lab.parity.resemblance import describe
from minisd.lab.parity.shadow import FAILURES, Call, Measure, distance, first_tensor, in_dtype, map_tensors, one_line
from minisd.lab.parity.sides import PipelineSide
from minisd.lab.parity.telling import conclude, count
from minisd.lab.parity.traces import TraceSide
from minisd.lab.parity.verdict import DIFFERENT, SAME, UNKNOWN, ModulePair, Rung, Verdict, limit
from minisd.lab.source import source_of

RESULTS = ("text/context", "alphas_cumprod", "timesteps", "decode/images", "pixels")
LOOK = 16.0  # R64 from here on is worth a look: a correct implementation that adds in another order has 1 to 5
STAGES = {"text": "text_encoder", "step": "unet", "decode": "vae"}

Run = Callable[[], Any]


def compare_with_trace(trace: TraceSide, live: PipelineSide, *, trace_is_a: bool = True) -> Verdict:
    """Compare. Raises ValueError for a trace without a known tensor, or with one that does not fit."""
    started = time.perf_counter()
    rungs = list(rungs_of(trace, live))
    pairs = [pair for stage in stages_in(trace) for pair in pairs_of(trace, live, stage)]
    if not rungs and not pairs:
        names = ", ".join(sorted(trace.tensors)[:4])
        raise ValueError(f"{trace.name}: none of its tensors ({names} ...) has a name of the trace format")
    mark(pairs, rungs)
    a, b = (trace.name, live.name) if trace_is_a else (live.name, trace.name)
    verdict = conclude(a, b, rungs, pairs)
    items: list[Rung | ModulePair] = [*rungs, *pairs]
    narrow = [
        item for item in items if item.relative64 is None and not (isinstance(item, Rung) and item.kind == "exact")
    ]
    if (narrow or not trace.has_float64) and not any(item.status == DIFFERENT for item in items):
        doubt(verdict, items, "the trace has no float64" if not trace.has_float64 else partly(len(narrow), len(items)))
    verdict.not_compared = list(left_out(trace, pairs))
    verdict.notes.append(f"the reference is {live.name}, which was run on the trace's inputs")
    verdict.case, verdict.versions = trace.case.as_dict(), {**live.versions(), **trace.versions()}
    verdict.seconds = time.perf_counter() - started
    return verdict


def partly(narrow: int, all_of_them: int) -> str:
    return f"{narrow:,} of the trace's {all_of_them:,} results {'is' if narrow == 1 else 'are'} not in float64"


def doubt(verdict: Verdict, items: list[Rung | ModulePair], why: str) -> None:
    """Without float64: R64 only, which may say "look" and no more."""
    found = [item for item in items if item.status == UNKNOWN]
    verdict.word = UNKNOWN
    if found:
        culprits = [item for item in items if item.culprit] or found[:1]
        verdict.culprits = [item.name for item in culprits]
        verdict.cause = f"look at {verdict.culprits[0]}: {how_far(culprits[0])}"
        verdict.sentence = f"cannot tell: {why}; {verdict.cause}"
    else:
        worst = max((item.r64 for item in items if item.r64 is not None), default=0.0)
        verdict.cause, verdict.culprits = "", []
        verdict.sentence = (
            f"cannot tell: {why}; nothing to look at: everything is within {worst:.1f} times the expected rounding"
        )


def how_far(item: Rung | ModulePair) -> str:
    """How many times the expected rounding; where that is no number, what is wrong instead."""
    if item.r64 is None or not math.isfinite(item.r64):
        return item.note or "it is not finite"
    return f"{item.r64:.3g} times the rounding that is to be expected"


# ---- one tensor ------------------------------------------------------------------------------------------


def judged(name: str, given: Tensor, wide: Tensor | None, live64: Tensor, live: Tensor) -> tuple[Measure, str]:
    """How far a trace's tensor is from the live one, and what that makes it: SAME, DIFFERENT or UNKNOWN (look)."""
    finite = live64[live64.isfinite()]
    size = (float(finite.abs().max()) if finite.numel() else 0.0) or 1.0
    eps = torch.finfo(live.dtype).eps
    floor = max(distance(live64, live) / size, eps / 2)
    best = given if wide is None else wide
    gap = distance(live64, best)
    found = Measure(gap / size, limit(floor, eps), gap, floor, distance(live64, given) / size)
    if wide is not None:
        return found, DIFFERENT if found.deviates else SAME
    return found, UNKNOWN if found.error > LOOK * floor or found.error != found.error else SAME


def rung_of(name: str, kind: str, trace: TraceSide, tensor: str, live64: Tensor, live: Tensor) -> Rung:
    """A tensor of the ladder."""
    given, wide = trace.tensors[tensor], trace.wide.get(tensor)
    found, status = judged(name, given, wide, live64, live)
    rung = Rung(name, kind, status, None, found.limit, found.absmax, found.floor, found.error, found.r64)
    rung.relative64 = found.relative64 if wide is not None else None
    if given.dtype == torch.float64:  # there is no working precision to speak of
        rung.error = rung.r64 = None
    if status != SAME:
        best = (given if wide is None else wide).double()
        rung.note = describe(live64, best) if live64.numel() == best.numel() else "another shape"
    return rung


# ---- the ladder ------------------------------------------------------------------------------------------


@contextmanager
def naming(trace: TraceSide, *names: str) -> Iterator[None]:
    """What the live side cannot compute, a trace of this model would not hold: a ValueError that names the tensors."""
    try:
        yield
    except (*FAILURES, ArithmeticError) as error:
        have = trace.best()
        told = ", ".join(f"{name} {tuple(have[name].shape)}" for name in names if name in have)
        raise ValueError(f"{trace.name}: does not fit the model: {told} ({one_line(error)})") from None


def twice(trace: TraceSide, live: PipelineSide, run: Callable[..., Tensor], *names: str) -> tuple[Tensor, Tensor]:
    """Something of the live side on tensors of the trace, in float64 and in its own precision."""
    inputs = [trace.best()[name] for name in names]
    with torch.no_grad(), naming(trace, *names):
        with float64():
            exactly = run(*widened(inputs))
        return exactly, run(*in_dtype(inputs, live.dtype))


def rungs_of(trace: TraceSide, live: PipelineSide) -> Iterator[Rung]:
    """Everything between prompt and pixels that the trace has."""
    have = trace.best()
    if "tokens" in have:
        yield exact("tokens", have["tokens"].long(), live.tokens([*trace.case.prompts, *trace.case.negatives]).long())
    if {"tokens", "text/context"} <= have.keys():
        said = twice(trace, live, lambda ids: live.embed(ids.long()), "tokens")
        yield rung_of("text embedding", "network", trace, "text/context", *said)
    yield from schedule_of(trace, live, have)
    for index in range(trace.case.steps):
        yield from step_of(trace, live, have, index)
    if {"decode/z", "decode/images"} <= have.keys():
        said = twice(trace, live, live.decode, "decode/z")
        yield rung_of("VAE decode", "network", trace, "decode/images", *said)
    if {"decode/images", "pixels"} <= have.keys():
        yield pixels_of(trace, live, have["pixels"].int())


def pixels_of(trace: TraceSide, live: PipelineSide, given: Tensor) -> Rung:
    """Bytes from the trace's own images. Where those are rounded, so may some bytes be, the other way."""
    with naming(trace, "decode/images"):
        right = live.pixels(trace.best()["decode/images"].float()).int()
    rung = exact("pixels", given, right)
    if rung.status == DIFFERENT and "decode/images" not in trace.wide and given.shape == right.shape:
        apart = int((given - right).abs().max())
        rung.status, rung.culprit = SAME if apart <= 1 else UNKNOWN, False
        rung.note += f", by {apart} at most" + (": rounding of images that are not in float64" if apart <= 1 else "")
    return rung


def schedule_of(trace: TraceSide, live: PipelineSide, have: dict[str, Tensor]) -> Iterator[Rung]:
    scheduler = live.scheduler()
    scheduler.set_timesteps(trace.case.steps)
    if "timesteps" in have:
        yield exact("timesteps", have["timesteps"].long(), torch.as_tensor(scheduler.timesteps).long())
    if "alphas_cumprod" in have:
        with float64():
            exactly = torch.as_tensor(live.scheduler().alphas_cumprod).double()
        yield rung_of("alphas", "glue", trace, "alphas_cumprod", exactly, torch.as_tensor(scheduler.alphas_cumprod))


def step_of(trace: TraceSide, live: PipelineSide, have: dict[str, Tensor], index: int) -> Iterator[Rung]:
    """The UNet, guidance and the scheduler's step, each on what the trace has."""
    here, title = f"step.{index}/", f"step {index}"

    def said(run: Callable[..., Tensor], *names: str) -> tuple[Tensor, Tensor]:
        return twice(trace, live, run, *(here + name for name in names))

    def given(*names: str) -> bool:
        return all(here + name in have for name in names)

    if given("latents", "timestep", "context", "noise"):
        told = said(live.predict, "latents", "timestep", "context")
        yield rung_of(f"UNet, {title}", "network", trace, f"{here}noise", *told)
    if given("noise", "guided") and trace.case.guidance > 1:

        def guide(noise: Tensor) -> Tensor:
            negative, positive = noise.chunk(2)
            return negative + trace.case.guidance * (positive - negative)

        yield rung_of(f"guidance, {title}", "glue", trace, f"{here}guided", *said(guide, "noise"))
    if given("guided", "timestep", "sample", "previous"):

        def step(noise: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
            scheduler = live.scheduler()
            scheduler.set_timesteps(trace.case.steps)
            return scheduler.step(noise, timestep, sample)[0]

        told = said(step, "guided", "timestep", "sample")
        yield rung_of(f"latents, {title}", "glue", trace, f"{here}previous", *told)


# ---- modules ---------------------------------------------------------------------------------------------


def stages_in(trace: TraceSide) -> list[str]:
    """text, step.0, ..., decode: those with modules in them."""
    found = dict.fromkeys(name.partition("/")[0] for name in trace.tensors if is_module(name))
    return [stage for stage in found if stage.partition(".")[0] in STAGES]


def is_module(name: str) -> bool:
    stage, _, rest = name.partition("/")
    return stage.partition(".")[0] in STAGES and ("." in rest or rest in COMPONENTS) and ":" not in rest


def is_result(name: str) -> bool:
    """Whether a tensor is something to compare, and not only an input."""
    return is_module(name) or name in RESULTS or name.partition("/")[2] in ("noise", "guided", "previous")


def run_stage(trace: TraceSide, live: PipelineSide, stage: str) -> Run | None:
    """The live side's own run of a stage, on the trace's inputs; None where they are not there."""
    have = trace.best()
    names = {"text": ("tokens",), "decode": ("decode/z",)}.get(stage) or tuple(
        f"{stage}/{part}" for part in ("latents", "timestep", "context")
    )
    if any(name not in have for name in names):
        return None
    run: Callable[..., Any] = {"text": live.embed, "decode": live.decode}.get(stage, live.predict)

    def again() -> None:
        inputs = [have[name] for name in names]
        exactly = torch.get_default_dtype() == torch.float64
        with naming(trace, *names):
            run(*(widened(inputs) if exactly else in_dtype(inputs, live.dtype)))

    return again


def pairs_of(trace: TraceSide, live: PipelineSide, stage: str) -> Iterator[ModulePair]:
    """Every module that the trace has at a stage, in the live side's order of computation."""
    network = live.networks[STAGES[stage.partition(".")[0]]]
    paths = {name: path for path, name in network.canonical.items()}
    wanted = {}
    for name in trace.tensors:
        if is_module(name) and name.startswith(f"{stage}/"):
            canonical = resolve(network.component, network.config, name.partition("/")[2])
            if canonical in paths:
                wanted[paths[canonical]] = name
    run = run_stage(trace, live, stage)
    if run is None or not wanted:
        return
    with torch.no_grad():
        with float64():
            outputs64, calls = listened(network, wanted, run)
        outputs, _ = listened(network, wanted, run)
        for path in outputs64:
            tensor = wanted[path]
            own = alone(trace, live, network.root.get_submodule(path), tensor, calls[path])
            yield pair_of(trace, network, path, tensor, own or (outputs64[path], outputs[path]), own is not None)


def listened(network: Network, wanted: dict[str, str], run: Run) -> tuple[dict[str, Tensor], dict[str, Call]]:
    """Run a stage; what do its modules say, and how are they called?"""
    outputs: dict[str, Tensor] = {}
    calls: dict[str, Call] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs[path], calls[path] = first_tensor(output), Call.of(args, kwargs)

        return hook

    with ExitStack() as stack:
        for path in wanted:
            hook = network.root.get_submodule(path).register_forward_hook(note(path), with_kwargs=True)
            stack.callback(hook.remove)
        run()
    return outputs, calls


def alone(
    trace: TraceSide, live: PipelineSide, module: nn.Module, tensor: str, call: Call
) -> tuple[Tensor, Tensor] | None:
    """The live module on the inputs that the trace has for it, in both precisions; None where it has none."""
    have = trace.best()
    inputs: list[Tensor] = []
    while f"{tensor}:{len(inputs)}" in have:
        inputs.append(have[f"{tensor}:{len(inputs)}"])
    if not inputs:
        return None
    try:
        args, kwargs = call.filled(widened(inputs))
        with float64():
            exactly = first_tensor(module(*args, **kwargs))
        return exactly, roughest(module, in_dtype(args, live.dtype), in_dtype(kwargs, live.dtype), exactly)
    except FAILURES as error:
        raise ValueError(f"{trace.name}: {tensor}: the inputs do not fit ({one_line(error)})") from None


def roughest(module: nn.Module, args: Any, kwargs: Any, exactly: Tensor) -> Tensor:
    """The module's answer in working precision, in that memory layout of its input that rounds more."""
    layouts = (Tensor.contiguous, channels_last)
    said = [first_tensor(module(*map_tensors(lay_out, args), **kwargs)) for lay_out in layouts]
    return max(said, key=lambda tensor: distance(exactly, tensor))


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def pair_of(
    trace: TraceSide, network: Network, path: str, tensor: str, said: tuple[Tensor, Tensor], isolated: bool
) -> ModulePair:
    """The measurement of one module."""
    wide = trace.wide.get(tensor)
    found, status = judged(tensor, trace.tensors[tensor], wide, *said)
    stage, _, name = tensor.partition("/")
    canonical = f"{network.component}.{network.canonical[path]}".rstrip(".")
    module = network.root.get_submodule(path)
    pair = ModulePair(canonical, path, name, "", type(module).__name__, "", source_of(module))
    pair.status, pair.limit, pair.absmax, pair.floor = status, found.limit, found.absmax, found.floor
    pair.relative64 = found.relative64 if wide is not None else None
    pair.calls, pair.stage = 1, stage
    if trace.tensors[tensor].dtype != torch.float64:
        pair.error, pair.r64 = found.error, found.r64
    pair.b_dtype = str(trace.tensors[tensor].dtype).removeprefix("torch.")
    pair.note = "" if isolated else OUTPUT_ONLY
    if status != SAME:
        best = (trace.tensors[tensor] if wide is None else wide).double()
        said_so = describe(said[0], best) if best.numel() == said[0].numel() else "another shape"
        pair.note = "; ".join(filter(None, [pair.note, said_so]))
    return pair


OUTPUT_ONLY = "checked in its stage: the trace has no inputs for it"


def mark(pairs: list[ModulePair], rungs: list[Rung]) -> None:
    """Culprits: modules that are off on their own inputs and have none inside that is; else the first that is off.

    Where something is different for certain, what is only worth a look is no culprit.
    """
    items: list[Rung | ModulePair] = [*rungs, *pairs]
    proved = any(item.status == DIFFERENT for item in items)
    off = [pair for pair in pairs if pair.status == DIFFERENT or (pair.status != SAME and not proved)]
    surely = [pair for pair in off if not pair.note.startswith(OUTPUT_ONLY)] or off[:1]
    for pair in surely:
        pair.culprit = not any(
            other.name.startswith(f"{pair.name}.") and other.stage == pair.stage
            for other in surely
            if other is not pair
        )
    networks = {STAGES[pair.stage.partition(".")[0]] for pair in off}
    for rung in rungs:
        if rung.kind == "network" and rung.status == DIFFERENT:
            component = {"text": "text_encoder", "UNet": "unet", "VAE": "vae"}[rung.name.split(",")[0].split()[0]]
            rung.culprit = component not in networks
        elif rung.status == DIFFERENT:
            rung.culprit = True


def left_out(trace: TraceSide, pairs: list[ModulePair]) -> Iterator[str]:
    """What the trace does not have, or has and nobody could use."""
    yield "anything that is not in the trace: other prompts, sizes and steps, weights"
    used = {f"{pair.stage}/{pair.b}" for pair in pairs}
    modules = [name for name in trace.tensors if is_module(name) and name not in used]
    if modules:
        yield f"{count(len(modules), 'tensor')} without a counterpart, such as {modules[0]}"
