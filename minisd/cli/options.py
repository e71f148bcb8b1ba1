"""Every option of the picture commands, once; a command says which it takes, by name. Nothing here waits for torch.

An option's parameter has the name that the setting has in `minisd.sampling.Sampling`, wherever it is one.
"""

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from minisd.backends import ENGINES

Command = TypeVar("Command", bound=Callable[..., Any])
SEEDS = click.IntRange(0, 2**63 - 1)


class Size(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """ "512" or "512x768" (width x height), in pixels."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        numbers = str(value).lower().split("x")
        if len(numbers) > 2 or not all(re.fullmatch("[0-9]{1,5}", number) for number in numbers):
            self.fail(f"{value!r} is not a size such as 512 or 512x768", param, ctx)
        return int(numbers[0]), int(numbers[-1])


OPTIONS: dict[str, Any] = {
    "output": click.option(
        "-o", "--output", metavar="FILE.png", help="Where to write. [default: named after prompt and seed]"
    ),
    "picture-output": click.option("-o", "--output", metavar="FILE.png", help="Draw it there. [default: as text]"),
    "gif": click.option("-o", "--output", metavar="FILE.gif", help="[default: named after prompt and seed]"),
    "page": click.option("-o", "--output", metavar="FILE.html", help="Where to write. [default: named after prompt]"),
    "versus": click.option(
        "--versus", multiple=True, metavar="NAME=VALUE", help="Compare with a run of another seed, prompt, model, ..."
    ),
    "x": click.option("--x", metavar="NAME=V,V", help="What varies from column to column."),
    "y": click.option("--y", metavar="NAME=V,V", help="What varies from row to row."),
    "what-if": click.option(
        "--what-if/--no-what-if", default=True, help="Also without each word, without each block.  [default: yes]"
    ),
    "model": click.option(
        "-m", "--model", default="emoji", show_default=True, help="emoji, sd15, a folder, a file, or a hub id."
    ),
    "vae": click.option("--vae", help="Take the VAE from this folder, file or checkpoint."),
    "tokenizer": click.option("--tokenizer", metavar="FOLDER", help="Take the tokenizer from there."),
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
        "-n", "--negative", "negative_prompt", default="", metavar="PROMPT", help="What to move away from."
    ),
    "seed": click.option("-s", "--seed", type=SEEDS, help="[default: drawn and printed]"),
    "steps": click.option("--steps", type=click.IntRange(1), help="Denoising steps. [default: the model's, or 50]"),
    "guidance": click.option(
        "-g",
        "--guidance",
        "guidance_scale",
        type=float,
        help="Classifier-free guidance scale. [default: the model's, or 7.5]",
    ),
    "guidance-rescale": click.option(
        "--guidance-rescale", type=float, default=0.0, help="0 to 1: against overexposure by strong guidance."
    ),
    "size": click.option("--size", type=Size(), help="Pixels, divisible by 8. [default: the model's]"),
    "scheduler": click.option(
        "--scheduler",
        default="ddim",
        show_default=True,
        metavar="NAME",
        help="ddim, ddpm, pndm, lms, euler, euler_a, heun, dpm++_2m, unipc, lcm, ...; model: its own.",
    ),
    "prediction": click.option(
        "--prediction",
        type=click.Choice(["epsilon", "v_prediction", "sample"]),
        help="What the UNet predicts, where the files do not say.",
    ),
    "eta": click.option("--eta", type=float, default=0.0, help="Randomness of DDIM, 0 to 1."),
    "images": click.option(
        "--images",
        "images_per_prompt",
        type=click.IntRange(1, 1000),
        default=1,
        help="How many; also written as one grid.",
    ),
    "batch": click.option(
        "--batch",
        type=click.IntRange(1),
        help="How many of --images at once; 1: each equal to the bit to the same image alone. [default: all]",
    ),
    "clip-skip": click.option(
        "--clip-skip", type=click.IntRange(0), default=0, help="Leave out that many last text encoder layers."
    ),
    "device": click.option(
        "--device", default="auto", help="cpu, cuda, mps. [default: an accelerator if there is one]"
    ),
    "dtype": click.option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto"),
    "engine": click.option(
        "--engine",
        type=click.Choice(ENGINES),
        default="exact",
        help="How the networks are computed.",
    ),
    "tile": click.option(
        "--tile/--no-tile", default=None, help="Decode in tiles, with less memory. [default: above 1024x1024 pixels]"
    ),
    "steps-dir": click.option("--steps-dir", metavar="FOLDER", help="Also save each step's predicted image."),
    "json": click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON."),
    "quiet": click.option("-q", "--quiet", is_flag=True, help="No progress bar."),
    "strength": click.option(
        "--strength", type=click.FloatRange(0, 1), help="0 to 1: how much noise is added, and so how much changes."
    ),
    "set": click.option(
        "--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change the model's schedule; again for more."
    ),
    "frames": click.option("--frames", type=click.IntRange(2, 1000), default=9, show_default=True),
    "to-seed": click.option("--to-seed", type=SEEDS, help="[default: the seed after]"),
    "pictures": click.option(
        "--pictures", nargs=2, metavar="FROM TO", help="From one picture to another, instead of seeds."
    ),
    "and": click.option("--and", "others", multiple=True, metavar="PROMPT:WEIGHT", help="One more prompt at once."),
    "weight": click.option("--prompt-weight", "weight", type=float, default=1.0, help="PROMPT's own weight then."),
    "weighted": click.option("--weighted", is_flag=True, help="Read (word:1.3), (word) and [word] as weights."),
    "colour": click.option("--colour", help="Guide towards this mean colour: blue, #4080ff, ..."),
    "colour-scale": click.option("--colour-scale", type=float, default=3.0, show_default=True, help="How strongly."),
    "keep-outside": click.option(
        "--keep-outside/--no-keep-outside",
        default=True,
        help="Put PICTURE's own pixels back outside the mask, or let all go through the VAE.  [default: keep]",
    ),
    "long-prompts": click.option(
        "--long-prompts", is_flag=True, help="Read prompts of more than 75 tokens whole, in windows of 75."
    ),
    "plain": click.option("--plain", is_flag=True, help="Plain DDIM inversion: one UNet call a step, not exact."),
    "cross": click.option(
        "--cross",
        type=click.FloatRange(0, 1),
        default=0.8,
        show_default=True,
        help="Share of steps with the old maps.",
    ),
    "self-attention": click.option(
        "--self",
        "self_attention",
        type=click.FloatRange(0, 1),
        default=0.4,
        show_default=True,
        help="In self-attention.",
    ),
    "reweight": click.option("--reweight", multiple=True, metavar="WORD:WEIGHT", help="Attend to a word so much more."),
    "check": click.option("--check", is_flag=True, help="Say where the first NaN is, and how large values get."),
    "start": click.option(
        "--start", type=click.IntRange(0), help="Invert to this step, 0 is noise. [default: a tenth of the steps]"
    ),
}
NOT_KEPT = ("output", "quiet", "as_json", "steps_dir", "check")  # what changes no picture, and none remembers
# What the same options are called by other programs; `--help` has one name.
ALIASES = {
    "--negative-prompt": "--negative",
    "--guidance-scale": "--guidance",
    "--cfg": "--guidance",
    "--cfg-scale": "--guidance",
    "--num-images": "--images",
    "--color": "--colour",
    "--color-scale": "--colour-scale",
    "--num-inference-steps": "--steps",
    "--sampler": "--scheduler",
}


class PictureCommand(click.Command):
    """A command that knows `ALIASES` of its options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for parameter in self.params for name in parameter.opts}
        known = {alias: name for alias, name in ALIASES.items() if name in own}
        end = args.index("--") if "--" in args else len(args)
        for place, text in enumerate(args[:end]):
            name, equals, value = text.partition("=")
            if name in known:
                args[place] = known[name] + equals + value
        return super().parse_args(ctx, args)


MODEL = ("model", "vae", "tokenizer", "weights", "prediction", "lora", "embedding")
RUN = ("device", "dtype", "engine", "tile")
REPORT = ("json", "quiet")
INVERSION = (
    *("output", *MODEL, "negative", "steps", "guidance", "guidance-rescale", "size", "clip-skip", "long-prompts"),
    *(*RUN, *REPORT),
)
GENERATION = (
    *("output", *MODEL, "negative", "seed", "steps", "guidance", "guidance-rescale", "size", "scheduler", "eta"),
    *("images", "batch", "clip-skip", "long-prompts", *RUN, "steps-dir", *REPORT),
)


def options(*names: str) -> Callable[[Command], Command]:
    """Give a command the options of these names, in this order."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = OPTIONS[name](command)
        return command

    return decorate


def path_and_number(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.8" -> the path and 0.8; a path that is there is taken whole."""
    return (text, 1.0) if os.path.exists(os.path.expanduser(text)) else text_and_number(text)


def path_and_token(text: str) -> tuple[str, str | None]:
    """ "thing.safetensors:<thing>" -> the path and the token. What is there, a drive's colon and folders are a path."""
    path, _, token = text.rpartition(":")
    drive = len(path) == 1 and path.isalpha()
    whole = not path or drive or "/" in token or "\\" in token or os.path.exists(os.path.expanduser(text))
    return (text, None) if whole else (path, token)


def text_and_number(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.8" -> the path and 0.8; "blue circle:0.5" -> the prompt and 0.5; without a number, 1."""
    left, _, number = text.rpartition(":")
    try:
        return (left, float(number)) if left else (text, 1.0)
    except ValueError:
        return text, 1.0
