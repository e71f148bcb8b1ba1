"""The command `minisd`.

Results go to standard output, the path written last; progress and warnings to standard error. Bad input ends with one
line and exit status 2. Only click is imported here: `minisd --help` does not wait for torch. The commands, one file a
group: `paint.py`, `weights.py`, `lora.py`, `parity.py`.
"""

import sys

import click

import minisd
from minisd.cli import lora, paint, parity, weights
from minisd.cli.notes import Notes


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, invoke_without_command=True
)
@click.version_option(minisd.__version__, prog_name="minisd")
@click.pass_context
def cli(context: click.Context) -> None:
    """Stable Diffusion 1.5 from scratch: a model to read, exact to the bit, ready to use."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (*paint.COMMANDS, *weights.COMMANDS, *lora.COMMANDS, *parity.COMMANDS):
    cli.add_command(command)


# How torch says, in a RuntimeError, that something is larger than the memory.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "storage size calculation overflowed")


def main() -> None:
    """Run the command line; turn every foreseen error into one line and exit status 2, every warning into a note.

    Exit status 1, with what was made written: a command says so itself, or a number was not finite.
    """
    try:
        with Notes() as notes:
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
    sys.exit(status if isinstance(status, int) and status else notes.status)


def fail(message: str) -> None:
    """Say what is wrong, in one line, and leave with exit status 2."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    click.echo(f"error: {'; '.join(lines)}", err=True)
    sys.exit(2)
