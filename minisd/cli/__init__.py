"""The command `minisd`.

Results go to standard output, the path written last; progress and warnings to standard error. Bad input ends with one
line and exit status 2. Only click is imported here: `minisd --help` does not wait for torch.
"""

import re
import sys
from typing import Any

import click

import minisd
from minisd.cli import lora as lora_commands
from minisd.cli import parity as parity_lab
from minisd.cli import weights as lab


class Size(click.ParamType):
    """ "512" or "512x768" (width x height), in pixels."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        numbers = str(value).lower().split("x")
        if len(numbers) > 2 or not all(re.fullmatch("[0-9]{1,5}", number) for number in numbers):
            self.fail(f"{value!r} is not a size such as 512 or 512x768", param, ctx)
        return int(numbers[0]), int(numbers[-1])


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, invoke_without_command=True
)
@click.version_option(minisd.__version__, prog_name="minisd")
@click.pass_context
def cli(context: click.Context) -> None:
    """Stable Diffusion 1.5 from scratch: a model to read, exact to the bit, ready to paint."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# Every option stands here once; a command says which it takes, by name.
OPTIONS: dict[str, Any] = {
    "output": click.option(
        "-o", "--output", metavar="FILE.png", help="Where to write. [default: named after prompt and seed]"
    ),
    "model": click.option(
        "-m", "--model", default="emoji", show_default=True, help="emoji, sd15, a folder, a file, or a hub id."
    ),
    "vae": click.option("--vae", help="Take the VAE from this folder, file or checkpoint."),
    "weights": click.option(
        "--weights", type=click.Choice(["auto", "ema", "raw"]), default="auto", help="If a file has two sets."
    ),
    "lora": click.option("--lora", "loras", multiple=True, metavar="PATH[:SCALE]", help="Load a LoRA; again for more."),
    "embedding": click.option(
        "--embedding",
        "embeddings",
        multiple=True,
        metavar="PATH[:TOKEN]",
        help="Load a textual inversion; again for more.",
    ),
    "negative": click.option(
        "-n", "--negative", default="", metavar="PROMPT", help="What should not be in the picture."
    ),
    "seed": click.option("-s", "--seed", type=click.IntRange(0, 2**63 - 1), help="[default: drawn and printed]"),
    "steps": click.option("--steps", type=click.IntRange(1), help="Denoising steps. [default: the model's, or 50]"),
    "guidance": click.option(
        "-g", "--guidance", type=float, help="How strictly to follow the prompt. [default: the model's, or 7.5]"
    ),
    "guidance-rescale": click.option(
        "--guidance-rescale", type=float, default=0.0, help="0 to 1: against overexposure by strong guidance."
    ),
    "size": click.option("--size", type=Size(), help="Pixels, divisible by 8. [default: the model's]"),
    "scheduler": click.option("--scheduler", type=click.Choice(["ddim", "ddpm"]), default="ddim", show_default=True),
    "eta": click.option("--eta", type=float, default=0.0, help="Randomness of DDIM, 0 to 1."),
    "images": click.option(
        "--images", type=click.IntRange(1, 1000), default=1, help="How many; also written as one grid."
    ),
    "clip-skip": click.option(
        "--clip-skip", type=click.IntRange(0), default=0, help="Leave out that many last text layers."
    ),
    "device": click.option(
        "--device", default="auto", help="cpu, cuda, mps. [default: an accelerator if there is one]"
    ),
    "dtype": click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto"),
    "steps-dir": click.option("--steps-dir", metavar="FOLDER", help="Also save the picture as each step foresees it."),
    "json": click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON."),
    "quiet": click.option("-q", "--quiet", is_flag=True, help="No progress bar."),
}
MODEL = ("model", "vae", "weights", "device", "dtype")
PAINTING = tuple(OPTIONS)
WALKING = tuple(name for name in OPTIONS if name not in ("seed", "scheduler", "eta", "images", "steps-dir"))
OPTIONS |= {
    "strength": click.option("--strength", type=click.FloatRange(0, 1), help="0 to 1: how much is painted anew."),
    "set": click.option(
        "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change the model's schedule; again for more."
    ),
    "gif": click.option("-o", "--output", metavar="FILE.gif", help="[default: named after prompt and seed]"),
    "frames": click.option("--frames", type=click.IntRange(2, 1000), default=9, show_default=True),
    "to-seed": click.option("--to-seed", type=click.IntRange(0, 2**63 - 1), help="[default: the seed after]"),
    "pictures": click.option(
        "--pictures", nargs=2, metavar="FROM TO", help="From one picture to another, in the place of seeds."
    ),
    "and": click.option("--and", "others", multiple=True, metavar="PROMPT:WEIGHT", help="One more prompt at once."),
    "weight": click.option("--prompt-weight", "weight", type=float, default=1.0, help="PROMPT's own weight then."),
    "weighted": click.option("--weighted", is_flag=True, help="Read (word:1.3), (word) and [word] as weights."),
    "colour": click.option("--colour", help="Pull the picture's mean colour there: blue, #4080ff, ..."),
    "colour-scale": click.option("--colour-scale", type=float, default=3.0, show_default=True, help="How hard."),
    "plain": click.option("--plain", is_flag=True, help="Plain DDIM inversion: one try a step, not exact."),
    "check": click.option("--check", is_flag=True, help="Say where the first NaN is, and how large values get."),
    "start": click.option(
        "--start", type=click.IntRange(0), help="Go up to this step, 0 is pure noise. [default: a fifth of the steps]"
    ),
}


def options(*names: str) -> Any:
    """Give a command the options of these names, in this order."""

    def decorate(command: Any) -> Any:
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return decorate


@cli.command()
@click.argument("prompt")
@options(*PAINTING, "check")
def generate(**options: Any) -> None:
    """Paint PROMPT."""
    from minisd.cli.output import run

    run(**options)


@cli.command()
@click.argument("prompt")
@click.argument("image", metavar="PICTURE")
@options("output", "strength", *PAINTING[1:])
def img2img(**options: Any) -> None:
    """Repaint PICTURE as PROMPT says."""
    from minisd.cli.paint import img2img

    img2img(**options)


@cli.command()
@click.argument("prompt")
@click.argument("image", metavar="PICTURE")
@click.argument("mask")
@options("output", "strength", *PAINTING[1:])
def inpaint(**options: Any) -> None:
    """Paint PROMPT into PICTURE where the picture MASK is white."""
    from minisd.cli.paint import inpaint

    inpaint(**options)


@cli.command()
@click.argument("prompt")
@click.argument("image", metavar="PICTURE")
@options(*WALKING, "plain")
def invert(**options: Any) -> None:
    """Find the noise that paints PICTURE under PROMPT; write it, and the picture that comes back from it."""
    from minisd.cli.paint import invert

    invert(**options)


@cli.command()
@click.argument("prompt")
@click.argument("new_prompt")
@click.argument("image", metavar="PICTURE")
@options(*WALKING, "start", "plain")
def edit(**options: Any) -> None:
    """Change PICTURE, which shows PROMPT, into NEW_PROMPT: by inversion, so that the rest stays."""
    from minisd.cli.paint import edit

    edit(**options)


@cli.command()
@options("output", "model", "steps", "scheduler", "set", "json")
def schedule(**options: Any) -> None:
    """Show a noise schedule: alpha_bar, SNR, and the timesteps that each spacing visits.

    As text in the terminal, or with -o as a picture.
    """
    from minisd.cli.paint import schedule

    schedule(**options)


@cli.command()
@click.argument("prompt")
@click.argument("to_prompt", required=False)
@options("gif", "frames", "to-seed", "pictures", "seed", *WALKING[1:])
def interpolate(**options: Any) -> None:
    """Walk from PROMPT to TO_PROMPT, and from one seed, or one picture, to another.

    Writes the frames, all of them in a strip, and a GIF.
    """
    from minisd.cli.paint import interpolate

    interpolate(**options)


@cli.command()
@click.argument("prompt")
@options("output", "and", "weight", "weighted", "colour", "colour-scale", *PAINTING[1:])
def guide(**options: Any) -> None:
    """Paint PROMPT under more guidance: other prompts, weighted words, a colour."""
    from minisd.cli.paint import guide

    guide(**options)


for command in (
    lab.inspect,
    lab.keys,
    lab.convert,
    lab.diff,
    lab.merge,
    lab.selftest,
    lora_commands.lora,
    parity_lab.parity,
    parity_lab.trace,
    parity_lab.taps,
):
    cli.add_command(command)


# How torch says, in a RuntimeError, that something is larger than the memory.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "storage size calculation overflowed")


def main() -> None:
    """Run the command line; turn every foreseen error into one line and exit status 2."""
    try:
        status = cli.main(standalone_mode=False)
    except click.ClickException as error:
        fail(error.format_message())
    except click.Abort:
        sys.exit(130)
    except (ValueError, OSError, MemoryError) as error:
        fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise
        fail(f"not enough memory: {error}; try a smaller --size, fewer --images or --dtype bfloat16")
    sys.exit(status if isinstance(status, int) else 0)


def fail(message: str) -> None:
    """Say what is wrong, in one line, and leave with exit status 2."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    click.echo(f"error: {'; '.join(lines)}", err=True)
    sys.exit(2)
