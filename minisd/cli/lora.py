"""`minisd lora`: the commands about LoRAs. Only click is imported here."""

import json
from typing import Any

import click


@click.group()
def lora() -> None:
    """Make LoRAs. (To use one: generate --lora.)"""


@lora.command()
@click.argument("a")
@click.argument("b")
@click.option("--rank", type=click.IntRange(1, 4096), default=16, show_default=True, help="Dimensions of a change.")
@click.option("-o", "--output", metavar="FILE.safetensors", help="[default: named after B and the rank]")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float16", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar.")
def extract(a: str, b: str, rank: int, output: str | None, dtype: str, as_json: bool, quiet: bool) -> None:
    """Write the LoRA that makes the model A most like the model B."""
    from pathlib import Path

    import torch
    from tqdm import tqdm

    from minisd.lab.weights.extract import extract, lines

    target = output or f"{Path(b).stem}-rank{rank}.safetensors"
    with tqdm(unit="weight", leave=False, disable=True if quiet else None) as bar:
        done = extract(a, b, rank=rank, target=target, dtype=getattr(torch, dtype), advance=bar.update)
    if as_json:
        parts: dict[str, Any] = {
            name: {**vars(kept), "energy": kept.energy, "error": kept.error} for name, kept in done.components.items()
        }
        click.echo(json.dumps({"path": str(done.path), "rank": done.rank, "components": parts}))
        return
    for line in lines(done):
        click.echo(line)
    click.echo(done.path)


COMMANDS = (lora,)
