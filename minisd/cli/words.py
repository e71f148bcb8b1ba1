"""The words that a model knows, where its folder says: `words.txt`, the names and phrases of its training captions.

CLIP has seen nearly every word; the small model that comes with minisd has not, and generates something all the same.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

import click

from minisd.checkpoint.hub import EMBEDDED, resolve
from minisd.files import shown
from minisd.warn import warn

FILE = "words.txt"
WORD = re.compile(r"[^\W\d_]+|[^\w\s.,;:!?'\"()\[\]\\+-]")  # a word, or a sign such as an emoji


@click.command()
@click.argument("model", default="emoji")
def words(model: str) -> None:
    """List the names and phrases that MODEL was trained on, where its folder says."""
    phrases = phrases_of(model)
    if not phrases:
        raise ValueError(f"{model}: has no {FILE}; a full model was trained on nearly every word")
    click.echo("\n".join(phrases))


def phrases_of(model: str) -> list[str]:
    """The lines of the model's `words.txt`; none where there is no such file."""
    try:
        return (resolve(model) / FILE).read_text(encoding="utf-8").splitlines() if is_local(model) else []
    except (OSError, UnicodeError):
        return []


def is_local(model: str) -> bool:
    return model in EMBEDDED or Path(model).is_dir()


def tell_unknown(model: str, prompts: Iterable[str]) -> None:
    """Warn of words in the prompts that the model has never seen, with the nearest that it has."""
    known = {word for phrase in phrases_of(model) for word in WORD.findall(phrase)}
    asked = dict.fromkeys(word.lower() for prompt in prompts for word in WORD.findall(prompt))
    unknown = [word for word in asked if word not in known]
    if not known or not unknown:
        return
    near = {word: found[0] for word in unknown if (found := difflib.get_close_matches(word, known, 1, 0.75))}
    told = ", ".join(f"{word!r} (near: {near[word]})" if word in near else repr(word) for word in unknown)
    warn(
        f"the small model has never seen {shown(told, 120)}; `minisd words` lists what it knows, "
        "and a full model goes behind --model"
    )


COMMANDS = (words,)
