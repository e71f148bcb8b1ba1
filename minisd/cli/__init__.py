"""The command `minisd`.

Results go to standard output, the path written last; progress and warnings to standard error. Bad input ends with one
line and exit status 2. Only click is imported here: `minisd --help` does not wait for torch. The commands are in the
files beside this one, one file a group.
"""

import difflib
import gc
import os
import sys

import click

import minisd
from minisd.cli import batch, classes, explain, grid, lora, parity, pictures, show, studio, weights, words
from minisd.cli.notes import Notes


class Commands(click.Group):
    """The commands by name; what is no command but has several words is a prompt for `generate`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in self.commands or name.startswith("-"):
            return super().resolve_command(ctx, args)
        if len(name.split()) > 1:
            return "generate", self.commands["generate"], args
        raise click.UsageError(f"No such command {name!r}; {self.hint(name, args)}", ctx)

    def hint(self, name: str, args: list[str]) -> str:
        """The command that may have been meant, or that a prompt was."""
        close = [known for known in self.commands if known.startswith(name)]
        close = close or difflib.get_close_matches(name, self.commands)
        return f"did you mean {' or '.join(close)}?" if close else f'a prompt needs quotes: minisd "{" ".join(args)}"'


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    invoke_without_command=True,
)
@click.version_option(minisd.__version__, prog_name="minisd")
@click.pass_context
def cli(context: click.Context) -> None:
    """Stable Diffusion 1.5 from scratch: a model to read, exact to the bit, ready to use."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for group in (pictures, explain, grid, show, studio, classes, batch, weights, words, lora, parity):
    for command in group.COMMANDS:
        cli.add_command(command)


QUOTES = "; a prompt of several words needs quotes"

# How torch says, in a RuntimeError, that something is larger than the memory.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "storage size calculation overflowed")


def main() -> None:
    """Run the command line; turn every foreseen error into one line and exit status 2, every warning into a note.

    Exit status 1, with what was made written: a command says so itself, or a number was not finite.
    """
    start_gently()
    try:
        with Notes() as notes:
            status = cli.main(standalone_mode=False)
    except click.ClickException as error:
        fail(error.format_message() + (QUOTES if "unexpected extra argument" in error.message else ""))
    except click.Abort:
        sys.exit(130)
    except (ValueError, OSError, MemoryError) as error:
        fail(str(error) or type(error).__name__)
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise
        fail(f"not enough memory: {error}; try a smaller --size, fewer --images or --dtype bfloat16")
    sys.exit(status if isinstance(status, int) and status else notes.status)


def start_gently() -> None:
    """What must be said before torch is loaded. Numbers stay the same."""
    # Threads that wait for each other sleep, instead of keeping their cores busy: beside other processes on the same
    # cores, ten steps of the small model took 1.8 s instead of 71.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.set_threshold(100_000)  # importing makes objects that stay: looking for garbage among them took 0.3 of 2 s


def fail(message: str) -> None:
    """Say what is wrong, in one line, and leave with exit status 2."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    click.echo(f"error: {'; '.join(lines)}", err=True)
    sys.exit(2)
