"""`minisd explain`: one generation from the inside, as a page. Only click is imported here until the command runs."""

import os
import sys
from pathlib import Path
from typing import Any

import click

from minisd.cli.options import MODEL, REPORT, RUN, PictureCommand, options

SETTINGS = ("negative", "seed", "steps", "guidance", "guidance-rescale", "size", "scheduler", "eta", "clip-skip")


@click.command(cls=PictureCommand)
@click.argument("prompt")
@options("page", "versus", "what-if", *MODEL, *SETTINGS, *RUN, *REPORT)
def explain(prompt: str, output: str | None, versus: tuple[str, ...], what_if: bool, **options: Any) -> None:
    """Generate PROMPT once, and show from the inside how the picture came about: one HTML page, no network."""
    from minisd.cli.job import load, load_adapters, sampling_options
    from minisd.cli.output import check_folder, check_no_folder, name_of, report
    from minisd.cli.words import tell_unknown
    from minisd.explain import explain as look
    from minisd.tasks.values import read_values

    path = Path(os.path.expanduser(output or f"{name_of(prompt)}.html"))
    check_no_folder(path)
    check_folder(path.parent / "x")
    others = {name: value for name, (value,) in read_values(versus).items()}
    sd = load(options)
    load_adapters(sd, options["loras"], options["embeddings"])
    tell_unknown(options["model"], [prompt, options["negative_prompt"]])
    found = look(sd, prompt, versus=others, what_if=what_if, **sampling_options(options))
    if options["seed"] is None:
        print(f"seed {found.data['settings']['seed']}", file=sys.stderr)
    found.save(path)
    report([path], found.data | {"output": str(path)}, options["as_json"])


COMMANDS = (explain,)
