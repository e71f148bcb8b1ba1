"""A trace against a live model: every tensor of the trace is computed again, from the trace's own inputs.

The live side is the truth: it is run in float64, and in its working precision, which gives the rounding error that is
to be expected. A tensor in float64 is judged by the rule. One in float32 is not: R64 says how many times the expected
rounding it is away, and where to look; a trace that has such tensors can prove a difference, never sameness.

In: a `TraceSide` and a `PipelineSide`. Out: a `Verdict`.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minisd.checkpoint.keymap import COMPONENTS
from minisd.lab.hooks import Listener
from minisd.lab.parity.calls import FAILURES, Call, first_tensor, in_dtype, mapped, one_line
from minisd.lab.parity.conclude import conclude, count
from minisd.lab.parity.judge import (
    OUTPUT_ONLY,
    Observation,
    distance,
    exact,
    mark_first_causes,
    mark_recorded,
    measure,
    rung_of,
)
from minisd.lab.parity.pairing import Network, resolve
from minisd.lab.parity.promote import float64, widened
from minisd.lab.parity.sides import PipelineSide
from minisd.lab.parity.traces import TraceSide
from minisd.lab.parity.verdict import DIFFERENT, SAME, UNKNOWN, Finding, ModulePair, Rung, Verdict
from minisd.lab.sources import source_of

RESULTS = ("text/context", "alphas_cumprod", "timesteps", "decode/images", "pixels")
STAGES = {"text": "text_encoder", "step": "unet", "decode": "vae"}

Run = Callable[..., Any]


def compare_with_trace(trace: TraceSide, live: PipelineSide, *, trace_is_a: bool = True) -> Verdict:
    """Compare. Raises ValueError for a trace without a known tensor, or with one that does not fit."""
    started = time.perf_counter()
    again = Retrace(trace, live)
    rungs = list(again.rungs())
    pairs = [pair for stage in stages_in(trace) for pair in again.pairs(stage)]
    if not rungs and not pairs:
        names = ", ".join(sorted(trace.tensors)[:4])
        raise ValueError(f"{trace.name}: none of its tensors ({names} ...) has a name of the trace format")
    off = mark_recorded(pairs, rungs)
    mark_first_causes(rungs, {STAGES[pair.stage.partition(".")[0]] for pair in off})
    a, b = (trace.name, live.name) if trace_is_a else (live.name, trace.name)
    verdict = conclude(a, b, rungs, pairs)
    measured = [item for item in (*rungs, *pairs) if not (isinstance(item, Rung) and item.kind == "exact")]
    narrow = sum(item.relative64 is None for item in measured)
    proved = any(item.status == DIFFERENT for item in (*rungs, *pairs))
    if (narrow or not trace.wide) and not proved:
        doubt(verdict, partly(narrow, len(rungs) + len(pairs)) if trace.wide else "the trace has no float64")
    verdict.not_compared = list(left_out(trace, pairs))
    verdict.notes.append(f"the reference is {live.name}, which was run on the trace's inputs")
    verdict.case, verdict.versions = trace.case.as_dict(), {**live.versions(), **trace.versions()}
    verdict.seconds = time.perf_counter() - started
    return verdict


def partly(narrow: int, all_of_them: int) -> str:
    return f"{narrow:,} of the trace's {all_of_them:,} results {'is' if narrow == 1 else 'are'} not in float64"


def doubt(verdict: Verdict, why: str) -> None:
    """Without float64: R64 only, which may say "look" and no more."""
    items: list[Finding] = [*verdict.rungs, *verdict.pairs]
    found = [item for item in items if item.status == UNKNOWN]
    verdict.word, verdict.cause, verdict.culprits = UNKNOWN, "", []
    if found:
        culprits = [item for item in items if item.culprit] or found[:1]
        verdict.culprits = [item.name for item in culprits]
        verdict.cause = f"look at {verdict.culprits[0]}: {how_far(culprits[0])}"
        verdict.sentence = f"cannot tell: {why}; {verdict.cause}"
    else:
        worst = max((item.r64 for item in items if item.r64 is not None), default=0.0)
        verdict.sentence = (
            f"cannot tell: {why}; nothing to look at: everything is within {worst:.1f} times the expected rounding"
        )


def how_far(item: Finding) -> str:
    """How many times the expected rounding; where that is no number, what is wrong instead."""
    if item.r64 is None or not math.isfinite(item.r64):
        return item.note or "it is not finite"
    return f"{item.r64:.3g} times the rounding that is to be expected"


class Retrace:
    """A live side at work on a trace's tensors."""

    def __init__(self, trace: TraceSide, live: PipelineSide) -> None:
        self.trace, self.live, self.have = trace, live, trace.best()

    @contextmanager
    def naming(self, *names: str) -> Iterator[None]:
        """What the live side cannot compute does not fit the model: a ValueError that names the tensors."""
        try:
            yield
        except (*FAILURES, ArithmeticError) as error:
            told = ", ".join(f"{name} {tuple(self.have[name].shape)}" for name in names if name in self.have)
            raise ValueError(f"{self.trace.name}: does not fit the model: {told} ({one_line(error)})") from None

    def observe(self, name: str, tensor: str, live64: Tensor, live: Tensor, stage: str = "") -> Observation:
        """A tensor of the trace beside what the live side computes, in float64 and in its own precision."""
        given, wide = self.trace.tensors[tensor], self.trace.wide.get(tensor)
        narrow = None if wide is not None and given.dtype == torch.float64 else given
        return Observation(name, live64, live, wide, narrow, stage)

    def again(self, title: str, kind: str, result: str, run: Run, *names: str) -> Iterator[Rung]:
        """A rung: a result of the trace, computed again from its inputs, if all of them are there."""
        if all(name in self.have for name in (result, *names)):
            inputs = [self.have[name] for name in names]
            with torch.no_grad(), self.naming(*names):
                with float64():
                    exactly = run(*widened(inputs))
                narrow = run(*in_dtype(inputs, self.live.dtype))
            yield rung_of(self.observe(title, result, exactly, narrow), kind)

    # ---- the ladder

    def rungs(self) -> Iterator[Rung]:
        """Everything between prompt and pixels that the trace has."""
        have, live, case = self.have, self.live, self.trace.case
        if "tokens" in have:
            tokens = live.tokens([*case.prompts, *case.negatives])
            yield exact("tokens", have["tokens"].long(), tokens.long())
        embed: Run = lambda ids: live.embed(ids.long())  # noqa: E731
        yield from self.again("text embedding", "network", "text/context", embed, "tokens")
        yield from self.schedule()
        for index in range(case.steps):
            yield from self.step(f"step.{index}/", f"step {index}")
        yield from self.again("VAE decode", "network", "decode/images", live.decode, "decode/z")
        if {"decode/images", "pixels"} <= have.keys():
            yield self.pixels(have["pixels"].int())

    def schedule(self) -> Iterator[Rung]:
        scheduler = self.live.scheduler()
        scheduler.set_timesteps(self.trace.case.steps)
        if "timesteps" in self.have:
            visited = torch.as_tensor(scheduler.timesteps)
            yield exact("timesteps", self.have["timesteps"].long(), visited.long())
        if "alphas_cumprod" in self.have:
            with float64():
                exactly = torch.as_tensor(self.live.scheduler().alphas_cumprod).double()
            yield rung_of(self.observe("alphas", "alphas_cumprod", exactly, torch.as_tensor(scheduler.alphas_cumprod)))

    def step(self, here: str, title: str) -> Iterator[Rung]:
        """The UNet, guidance and the scheduler's step, each on the tensors of the trace."""
        live, case = self.live, self.trace.case

        def guide(noise: Tensor) -> Tensor:
            negative, positive = noise.chunk(2)
            return negative + case.guidance * (positive - negative)

        def step(noise: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
            scheduler = live.scheduler()
            scheduler.set_timesteps(case.steps)
            return scheduler.step(noise, timestep, sample)[0]

        def again(what: str, kind: str, result: str, run: Run, *inputs: str) -> Iterator[Rung]:
            return self.again(f"{what}, {title}", kind, here + result, run, *(here + name for name in inputs))

        yield from again("UNet", "network", "noise", live.predict, "latents", "timestep", "context")
        if case.guidance > 1:
            yield from again("guidance", "glue", "guided", guide, "noise")
        yield from again("latents", "glue", "previous", step, "guided", "timestep", "sample")

    def pixels(self, given: Tensor) -> Rung:
        """Bytes from the trace's own images. Where those are rounded, so may some bytes be, the other way."""
        with self.naming("decode/images"):
            right = self.live.pixels(self.have["decode/images"].float()).int()
        rung = exact("pixels", given, right)
        if rung.status == DIFFERENT and "decode/images" not in self.trace.wide and given.shape == right.shape:
            apart = int((given - right).abs().max())
            rung.status, rung.culprit = SAME if apart <= 1 else UNKNOWN, False
            rung.note += f", by {apart} at most" + (
                ": rounding of images that are not in float64" if apart <= 1 else ""
            )
        return rung

    # ---- modules

    def pairs(self, stage: str) -> Iterator[ModulePair]:
        """Every module that the trace has at a stage, in the live side's order of computation."""
        network = self.live.networks[STAGES[stage.partition(".")[0]]]
        wanted, run = self.wanted(network, stage), self.stage(stage)
        if run is None or not wanted:
            return
        with torch.no_grad():
            with float64():
                exactly, calls = listened(network, wanted, run)
            narrow, _ = listened(network, wanted, run)
            for path in exactly:
                own = self.alone(network.root.get_submodule(path), wanted[path], calls[path])
                pair = self.pair(network, path, wanted[path], own or (exactly[path], narrow[path]))
                if own is None:
                    pair.note = "; ".join(filter(None, [OUTPUT_ONLY, pair.note]))
                yield pair

    def wanted(self, network: Network, stage: str) -> dict[str, str]:
        """The live side's path of a module -> the tensor that the trace has of it at a stage."""
        paths = {name: path for path, name in network.canonical.items()}
        found = {}
        for name in self.trace.tensors:
            if is_module(name) and name.startswith(f"{stage}/"):
                canonical = resolve(network.component, network.config, name.partition("/")[2])
                if canonical in paths:
                    found[paths[canonical]] = name
        return found

    def stage(self, stage: str) -> Callable[[], Any] | None:
        """The live side's own run of a stage, on the trace's inputs; None where they are not there."""
        names = {"text": ("tokens",), "decode": ("decode/z",)}.get(stage) or tuple(
            f"{stage}/{part}" for part in ("latents", "timestep", "context")
        )
        if any(name not in self.have for name in names):
            return None
        run: Run = {"text": self.live.embed, "decode": self.live.decode}.get(stage, self.live.predict)

        def again() -> None:
            inputs = [self.have[name] for name in names]
            exactly = torch.get_default_dtype() == torch.float64
            with self.naming(*names):
                run(*(widened(inputs) if exactly else in_dtype(inputs, self.live.dtype)))

        return again

    def alone(self, module: nn.Module, tensor: str, call: Call) -> tuple[Tensor, Tensor] | None:
        """The live module on the inputs that the trace has for it, in both precisions; None where it has none."""
        inputs: list[Tensor] = []
        while f"{tensor}:{len(inputs)}" in self.have:
            inputs.append(self.have[f"{tensor}:{len(inputs)}"])
        if not inputs:
            return None
        try:
            args, kwargs = call.filled(widened(inputs))
            with float64():
                exactly = first_tensor(module(*args, **kwargs))
            narrow = (in_dtype(args, self.live.dtype), in_dtype(kwargs, self.live.dtype))
            return exactly, roughest(module, *narrow, exactly)
        except FAILURES as error:
            raise ValueError(f"{self.trace.name}: {tensor}: the inputs do not fit ({one_line(error)})") from None

    def pair(self, network: Network, path: str, tensor: str, computed: tuple[Tensor, Tensor]) -> ModulePair:
        """One module, judged."""
        stage, _, name = tensor.partition("/")
        module = network.root.get_submodule(path)
        canonical = f"{network.component}.{network.canonical[path]}".rstrip(".")
        pair = ModulePair(canonical, path, name, "", type(module).__name__, a_source=source_of(module))
        pair.b_dtype, pair.calls = str(self.trace.tensors[tensor].dtype).removeprefix("torch."), 1
        seen = self.observe(canonical, tensor, *computed, stage)
        found = measure(seen)
        found.write(pair)
        pair.status, pair.stage, pair.note = found.status, stage, "" if found.status == SAME else seen.described()
        return pair


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


def listened(
    network: Network, wanted: dict[str, str], run: Callable[[], Any]
) -> tuple[dict[str, Tensor], dict[str, Call]]:
    """Run a stage: the outputs of its modules, and how they are called."""
    outputs: dict[str, Tensor] = {}
    calls: dict[str, Call] = {}

    def notes(path: str) -> Callable[[Any, Any, Any], None]:
        def hear(args: Any, kwargs: Any, output: Any) -> None:
            outputs[path], calls[path] = first_tensor(output), Call.of(args, kwargs)

        return hear

    with Listener() as listener:
        for path in wanted:
            listener.after(network.root.get_submodule(path), notes(path))
        run()
    return outputs, calls


def roughest(module: nn.Module, args: Any, kwargs: Any, exactly: Tensor) -> Tensor:
    """The module's output in working precision, in that memory layout of its input that rounds more."""
    layouts = (Tensor.contiguous, channels_last)
    outputs = [first_tensor(module(*mapped(Tensor, lay, args), **mapped(Tensor, lay, kwargs))) for lay in layouts]
    return max(outputs, key=lambda tensor: distance(exactly, tensor))


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def left_out(trace: TraceSide, pairs: Sequence[ModulePair]) -> Iterator[str]:
    """What the trace does not have, or has and could not be compared."""
    yield "anything that is not in the trace: other prompts, sizes and steps, weights"
    used = {f"{pair.stage}/{pair.b}" for pair in pairs}
    modules = [name for name in trace.tensors if is_module(name) and name not in used]
    if modules:
        yield f"{count(len(modules), 'tensor')} without a counterpart, such as {modules[0]}"
