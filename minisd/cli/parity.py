"""The parity lab's commands: parity, trace, taps. Only click is imported here."""

import json
import sys
from pathlib import Path
from typing import Any

import click

PLAIN = (click.ClickException, ValueError, OSError, MemoryError)  # what the command line says in one line


def case_options(command: Any) -> Any:
    """What a case is made of."""
    made = (
        click.option("--prompt", "prompts", multiple=True, metavar="PROMPT", help="Again for a larger batch."),
        click.option("--negative", "negatives", multiple=True, metavar="PROMPT", help="One for each prompt."),
        click.option("--steps", type=click.IntRange(1), help="[default: 3; 2 for a large model]"),
        click.option("--guidance", type=float, help="[default: 5]"),
        click.option("--size", metavar="WIDTHxHEIGHT", help="[default: small, and not square]"),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="[default: 0]"),
        click.option("-q", "--quiet", is_flag=True, help="No progress."),
    )
    for option in reversed(made):
        command = option(command)
    return command


def case_of(options: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a case that were given, taken out of a command's options."""
    size = options.pop("size")
    case = {name: options.pop(name) for name in ("prompts", "negatives", "steps", "guidance", "seed")}
    if case["prompts"] and not case["negatives"]:
        case["negatives"] = ("",) * len(case["prompts"])
    if len(case["prompts"]) != len(case["negatives"]):
        raise ValueError("--negative: give one for each --prompt")
    if size is not None:
        width, _, height = size.lower().partition("x")
        if not (width.isdecimal() and (height or width).isdecimal()):
            raise ValueError(f"--size: {size!r} is not a size such as 64x96")
        case |= {"width": int(width), "height": int(height or width)}
    return {name: value for name, value in case.items() if value not in (None, ())}


def progress(quiet: bool) -> Any:
    """What is at work, as one line on standard error, if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        return lambda _: None
    return lambda what: click.echo(f"\r\033[K{what}", err=True, nl=False)


def done(quiet: bool) -> None:
    if not quiet and sys.stderr.isatty():
        click.echo("\r\033[K", err=True, nl=False)


@click.command()
@click.argument("a", required=False)
@click.argument("b", required=False)
@click.option("--demo", is_flag=False, flag_value="eps-resnet", metavar="[BUG]", help="Plant a mistake and find it.")
@click.option("--all", "every", is_flag=True, help="Show every pair of modules, not only the culprits.")
@click.option("--html", metavar="FILE.html", help="Also write a report: one file, to be read offline.")
@click.option("--save", metavar="CASE.zip", help="Also write a bundle: what somebody else needs to see this again.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@case_options
def parity(
    a: str | None,
    b: str | None,
    demo: str | None,
    every: bool,
    html: str | None,
    save: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Are A and B the same function? If not, where do they part?

    A, the reference, and B are each minisd:PATH, diffusers:PATH, trace:FILE.safetensors or
    python:package.module:function; a PATH may end in @float16 or @bfloat16. Both are run in float64, so that no
    tolerance has to be chosen: what differs there is another function, what differs only in float32 is rounding.

    A python: function returns a module of your own and a name map, from its own paths to names in minisd, diffusers or
    CompVis' code; "" is the module itself, and modules inside that are not named are paired by their weights:

    \b
        def my_resnet():
            return MyBlock(...), {"": "unet.down.0.resnet", "first_norm": "unet.down.0.resnet.norm1"}

    Or, with one parameter, it computes named tensors from named tensors, as in a trace (see `minisd trace --help`).

    Or A is a bundle, CASE.zip, that --save wrote: the same case again, on its own sides.

    Exit status: 0 the same function, 1 different functions, 2 cannot tell, or bad input.

    --demo compares a model (A, by default the embedded one) with a copy that has a bug of your choice in it;
    --demo list names the bugs.
    """
    if demo == "list":
        return list_bugs()
    check_request(a, b, demo, html, save)
    quiet = options.pop("quiet")
    case = case_of(options)
    evidence = None
    if html is not None:
        from minisd.lab.parity.evidence import Evidence

        evidence = Evidence()
    try:
        verdict = judged(a, b, demo, case, evidence, progress(quiet))
    except PLAIN:
        raise
    except Exception as error:  # exit status 1 is a verdict: a failure must not look like one
        raise ValueError(f"the comparison broke off ({type(error).__name__}: {error})") from error
    finally:
        done(quiet)
    from minisd.lab.parity.text import lines

    click.echo(json.dumps(verdict.as_dict()) if as_json else "\n".join(lines(verdict, every_pair=every)))
    for path in written(verdict, evidence, html, save, (a, b), demo):
        click.echo(path, err=as_json)
    return verdict.exit_status


def check_request(a: str | None, b: str | None, demo: str | None, html: str | None, save: str | None) -> None:
    """Raise ValueError, before the work begins, for files that cannot be written and for missing sides."""
    for path, ending in ((html, ".html"), (save, ".zip")):
        if path is not None and not (path.endswith(ending) and Path(path).absolute().parent.is_dir()):
            raise ValueError(f"{path}: must be a name that ends in {ending}, in a folder that exists")
    if a is None and demo is None:
        raise ValueError("parity needs two sides to compare (see `minisd parity --help`), or --demo")
    if save is not None:
        from minisd.lab.parity import bundle

        bundle.check_sides(Path(save), (None, None) if demo else (a, b))


def judged(a: str | None, b: str | None, demo: str | None, case: dict[str, Any], observe: Any, progress: Any) -> Any:
    """The verdict, whichever way it was asked for."""
    from minisd.lab.parity.compare import compare

    if demo is not None:
        return demonstrated(demo, a, b, case, observe, progress)
    if a is not None and a.endswith(".zip"):
        return reproduced(a, b, case, observe, progress)
    if a is None or b is None:
        raise ValueError("parity needs two sides to compare (see `minisd parity --help`), or --demo")
    return compare(a, b, case, observe=observe, progress=progress)


def written(verdict: Any, evidence: Any, html: str | None, save: str | None, sides: Any, demo: str | None) -> Any:
    """Write the report and the bundle that were asked for; their paths."""
    if html is not None:
        from minisd.files import write_whole
        from minisd.lab.parity.report import report

        write_whole(Path(html), report(verdict, evidence).encode())
        yield html
    if save is not None:
        from minisd.lab.parity import bundle

        bundle.write(Path(save), verdict, sides)
        yield save


def list_bugs() -> int:
    from minisd.lab.parity.bugs import BUGS

    width = max(map(len, BUGS))
    click.echo("\n".join(f"{one.name:<{width}}  {one.what}" for one in BUGS.values()))
    return 0


def demonstrated(bug: str, a: str | None, b: str | None, case: dict[str, Any], observe: Any, progress: Any) -> Any:
    """Plant a bug in a copy, and compare."""
    from minisd.lab.parity.bugs import BUGS, demonstrate

    if b is not None:
        raise ValueError("--demo makes B itself: give A only, or nothing")
    verdict = demonstrate(bug, a, case, progress, observe)
    click.echo(f"planted: {BUGS[bug].what}", err=True)
    return verdict


def reproduced(path: str, b: str | None, case: dict[str, Any], observe: Any, progress: Any) -> Any:
    """A bundle's case again. What is not as it was is among the verdict's notes."""
    from minisd.lab.parity import bundle
    from minisd.lab.parity.compare import compare

    if b is not None or case:
        raise ValueError(f"{path}: a bundle has its own sides and its own case: give nothing else")
    with bundle.opened(Path(path)) as found:
        verdict = compare(*found.sides, found.case, observe=observe, progress=progress)
        verdict.notes += bundle.differences(found)
        verdict.notes.append(f"when the bundle was made, the verdict was: {found.word}")
    verdict.command = f"minisd parity {path}"
    return verdict


@click.command()
@click.argument("side")
@click.option("-o", "--output", required=True, metavar="FILE.safetensors")
@click.option("--float64", "exact", is_flag=True, help="Compute in float64: a trace that allows a verdict.")
@case_options
def trace(side: str, output: str, exact: bool, quiet: bool, **options: Any) -> None:
    """Record what SIDE (minisd:PATH or diffusers:PATH) computes: inputs, every stage, every module.

    The file is what `minisd parity trace:FILE.safetensors minisd:PATH` reads. Programs in any language can write one:
    named tensors in safetensors' format, and in its metadata "minisd.trace": "1" and, as JSON, "case" with prompts,
    negatives, steps, guidance, height, width and seed. Names of tensors: tokens, text/context, timesteps,
    alphas_cumprod, step.0/latents, step.0/timestep, step.0/context, step.0/noise, step.0/guided, step.0/sample,
    step.0/previous, decode/z, decode/images, pixels; step.0/unet.down.0.resnet for a module's output, with :0, :1 for
    its inputs (see `minisd taps --list` for names). All are optional.
    """
    from minisd.lab.parity.compare import case_for
    from minisd.lab.parity.opening import open_side
    from minisd.lab.parity.sides import PipelineSide
    from minisd.lab.parity.traces import write

    opened = open_side(side)
    if not isinstance(opened, PipelineSide):
        raise ValueError(f"{side}: only minisd:PATH and diffusers:PATH can be traced")
    write(output, opened, case_for(opened, case_of(options)), exact=exact)
    click.echo(output)


@click.command()
@click.argument("model", required=False)
@click.option("--list", "listing", is_flag=True, help="List them all (the default).")
@click.option("--grep", metavar="TEXT", help="Only those with this in one of their names or their meaning.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, one object a line, with diffusers' and CompVis' names.")
def taps(model: str | None, listing: bool, grep: str | None, as_json: bool) -> None:
    """Every place inside a model that can be read or edited, by name: see `sd.taps` in Python.

    MODEL is emoji, a folder or a file; SD 1.5's architecture if none is given. Shapes are those of a guided run for
    one picture.
    """
    from minisd.config import SD15
    from minisd.lab.taps import catalogue
    from minisd.lab.weights.report import aligned

    rows = catalogue(SD15 if model is None else config_of(model))
    texts = [(row, " ".join((row.name, *row.aliases, row.meaning))) for row in rows]
    rows = [row for row, text in texts if grep is None or grep in text]
    if as_json:
        for row in rows:
            click.echo(json.dumps(vars(row)))
        return
    table = [(row.name, "x".join(map(str, row.shape)), row.meaning, row.source) for row in rows]
    for line in aligned([("name", "shape", "meaning", "source"), *table]):
        click.echo(line)


def config_of(model: str) -> Any:
    """A model's configuration, from its headers."""
    import torch

    from minisd.checkpoint.load import open_checkpoint

    return open_checkpoint(model, dtype=torch.float32).config


COMMANDS = (parity, trace, taps)
