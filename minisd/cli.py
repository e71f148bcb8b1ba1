"""The command `minisd`.

Results go to standard output, the path written last; progress and warnings to standard error. Bad input ends with one
line and exit status 2. Only click is imported here: `minisd --help` does not wait for torch.
"""

import re
import sys
from typing import Any

import click

import minisd


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


@cli.command()
@click.argument("prompt")
@click.option("-o", "--output", metavar="FILE.png", help="Where to write. [default: named after prompt and seed]")
@click.option("-m", "--model", default="emoji", show_default=True, help="emoji, sd15, a folder, a file, or a hub id.")
@click.option("--vae", help="Take the VAE from this folder, file or checkpoint.")
@click.option("--weights", type=click.Choice(["auto", "ema", "raw"]), default="auto", help="If a file has two sets.")
@click.option("-n", "--negative", default="", metavar="PROMPT", help="What should not be in the picture.")
@click.option("-s", "--seed", type=click.IntRange(0, 2**63 - 1), help="[default: drawn and printed]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps. [default: the model's, or 50]")
@click.option("-g", "--guidance", type=float, help="How strictly to follow the prompt. [default: the model's, or 7.5]")
@click.option("--guidance-rescale", type=float, default=0.0, help="0 to 1: against overexposure by strong guidance.")
@click.option("--size", type=Size(), help="Pixels, divisible by 8. [default: the model's]")
@click.option("--scheduler", type=click.Choice(["ddim", "ddpm"]), default="ddim", show_default=True)
@click.option("--eta", type=float, default=0.0, help="Randomness of DDIM, 0 to 1.")
@click.option("--images", type=click.IntRange(1, 1000), default=1, help="How many; also written as one grid.")
@click.option("--clip-skip", type=click.IntRange(0), default=0, help="Leave out that many last text layers.")
@click.option("--device", default="auto", help="cpu, cuda, mps. [default: an accelerator if there is one]")
@click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto")
@click.option("--steps-dir", metavar="FOLDER", help="Also save the picture as each step foresees it.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def generate(**options: Any) -> None:
    """Paint PROMPT."""
    from minisd.generate import run

    run(**options)


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
