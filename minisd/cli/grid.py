"""`minisd grid`: one prompt under settings that vary, on a labelled sheet. Only click is imported here at first."""

import csv
import io
import time
from typing import TYPE_CHECKING, Any

import click

from minisd.cli.explain import SETTINGS
from minisd.cli.options import MODEL, REPORT, RUN, PictureCommand, options

if TYPE_CHECKING:
    from minisd.pipeline import StableDiffusion


@click.command(cls=PictureCommand)
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@options("output", "x", "y", *MODEL, *SETTINGS, *RUN, *REPORT)
def grid(prompts: tuple[str, ...], output: str | None, x: str | None, y: str | None, **options: Any) -> None:
    """Generate PROMPT under settings that vary: a labelled sheet, the single pictures, and a CSV.

    What may vary: guidance, steps, seed, scheduler, eta, clip_skip, negative, prompt, model, lora (the scale of
    --lora), replace (its first value is searched in the prompt). For instance: --x guidance=1,4,7.5 --y steps=5,10
    """
    from dataclasses import replace
    from secrets import randbelow

    from tqdm import tqdm

    from minisd.cli.job import sampling_options
    from minisd.cli.output import check_no_folder, name_of, png_path, report, write_png
    from minisd.cli.words import tell_unknown
    from minisd.files import write_whole
    from minisd.pixel.sheet import sheet
    from minisd.sampling import Sampling
    from minisd.tasks.grid import cells, labels, pictures

    began, across, down = time.perf_counter(), axis(x), axis(y)
    if "lora" in (across[0], down[0]) and not options["loras"]:
        raise ValueError("lora: its values are the scale of --lora, which is missing")
    path = png_path(output or f"{name_of(prompts[0])}-grid.png")
    seed = randbelow(2**32) if options["seed"] is None else options["seed"]
    found = cells(prompts, replace(Sampling(**sampling_options(options)), seed=seed), across, down)
    names = {cell: path.with_name(f"{path.stem}-{cell.row + 1}-{cell.column + 1}.png") for cell in found}
    for name in (*names.values(), path.with_suffix(".csv")):
        check_no_folder(name)
    tell_unknown(options["model"], [cell.prompt for cell in found if cell.model is None])
    done = tqdm(pictures(found, loader(options)), total=len(found), disable=options["quiet"] or None, leave=False)
    made = {id(cell): picture for cell, picture in done}
    table = io.StringIO()
    writer = csv.DictWriter(table, ["file", "prompt", *dict.fromkeys(name for cell in found for name in cell.varied)])
    writer.writeheader()
    for cell in found:
        made[id(cell)].save(names[cell])
        writer.writerow({"prompt": cell.prompt, **cell.varied, "file": names[cell].name})
    rows = [text for prompt in prompts for text in labels(down, prompt if len(prompts) > 1 else "")]
    whole = sheet([made[id(cell)] for cell in found], rows, labels(across))
    write_png(path, whole, f"{'; '.join(prompts)}\nSeed: {seed}, X: {x}, Y: {y}, Model: {options['model']}")
    write_whole(path.with_suffix(".csv"), table.getvalue().encode())
    told = {"seed": seed, "images": list(map(str, names.values())), "csv": str(path.with_suffix(".csv"))}
    told |= {"output": str(path), "seconds": round(time.perf_counter() - began, 2)}
    report([*names.values(), path.with_suffix(".csv"), path], told, options["as_json"])


def axis(text: str | None) -> tuple[str, list[Any]]:
    """ "steps=5,10" -> the name and the values; None is one value of nothing."""
    from minisd.tasks.values import read_values

    return next(iter(read_values([text]).items())) if text else ("", [""])


def loader(options: dict[str, Any]) -> Any:
    """What loads the model of a cell: its own or the command's, and the LoRAs at its scale."""
    from minisd.cli.job import load, load_adapters
    from minisd.cli.options import path_and_number

    def chosen(model: str | None, scale: float | None) -> "StableDiffusion":
        sd = load(options | ({"model": model} if model else {}))
        loras = options["loras"]
        if scale is not None:
            loras = tuple(f"{path_and_number(lora)[0]}:{scale}" for lora in loras)
        load_adapters(sd, loras, options["embeddings"])
        return sd

    return chosen


COMMANDS = (grid,)
