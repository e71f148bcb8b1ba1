"""A tokenizer's files: `tokenizer.json`, or `vocab.json` and `merges.txt`; or one text in a file's metadata.

What is read here is data, checked: `minisd/tokenizer.py` makes a tokenizer of it. This file needs the standard library
only.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisd.config import END, START
from minisd.files import CheckpointError, read_json, read_json_object, read_text, shown

if TYPE_CHECKING:
    from minisd.tokenizer import CLIPTokenizer

Merges = list[tuple[str, str]]
MAX_ID = 1 << 20  # no vocabulary of this family comes near


@dataclass(frozen=True)
class TokenizerData:
    """The arguments of a `CLIPTokenizer`, as a file states them."""

    vocabulary: dict[str, int]
    merges: Merges
    pad_token: str
    context_length: int
    added: list[str]


def checked(where: Path | str, data: TokenizerData) -> TokenizerData:
    """The same, or CheckpointError for what no tokenizer can be made of."""
    try:
        "".join(data.vocabulary).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: the tokenizer's vocabulary is not valid Unicode text") from None
    for token in (START, END, data.pad_token, *data.added):
        if token not in data.vocabulary:
            raise CheckpointError(f"{where}: the tokenizer's vocabulary has no {shown(repr(token))}")
    for left, right in data.merges:
        for token in (left, right, left + right):
            if token not in data.vocabulary:
                raise CheckpointError(
                    f"{where}: the tokenizer's vocabulary and merges disagree: it has no {shown(repr(token))}"
                )
    return data


# ---- a folder ----------------------------------------------------------------------------------------------------


def read_folder(folder: str | os.PathLike[str]) -> TokenizerData:
    """Read a `tokenizer/` folder. Raises CheckpointError for missing or broken files."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        vocabulary, merges = read_tokenizer_json(folder / "tokenizer.json")
    else:
        vocabulary = checked_vocabulary(folder / "vocab.json", read_json(folder / "vocab.json"))
        merges = read_merges(folder / "merges.txt")
    settings = read_settings(folder)
    special = (START, END, settings["pad_token"])
    added = {token: index for token, index in read_added(folder).items() if token not in special}
    vocabulary = checked_vocabulary(folder, vocabulary | added)
    return checked(folder, TokenizerData(vocabulary, merges, **settings, added=list(added)))


def checked_vocabulary(where: Path | str, vocabulary: Any) -> dict[str, int]:
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [None]
    if not all(isinstance(n, int) and 0 <= n < MAX_ID for n in ids) or len(set(ids)) != len(ids):
        raise CheckpointError(f"{where}: is not a table from tokens to different ids")
    return dict(vocabulary)


def read_merges(path: Path) -> Merges:
    """merges.txt: one pair a line; a first line that says "#version" is a comment."""
    lines = read_text(path).split("\n")
    rows = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if not all(len(row) == 2 for row in rows):
        raise CheckpointError(f"{path}: is not a list of pairs")
    return [(left, right) for left, right in rows]


def read_tokenizer_json(path: Path) -> tuple[dict[str, int], Merges]:
    """tokenizer.json: the vocabulary with later additions, and the merges in either of their spellings."""
    stored = read_json(path)
    try:
        model = stored["model"]
        if model.get("type", "BPE") != "BPE":
            raise CheckpointError(f"{path}: is a {shown(model['type'], 40)} tokenizer, not a byte-pair tokenizer")
        vocabulary = {**model["vocab"], **added_of(stored)}
        rows = [row.split(" ") if isinstance(row, str) else row for row in model["merges"]]
        merges = [(left, right) for left, right in rows]
        if not all(isinstance(token, str) for pair in merges for token in pair):
            raise TypeError
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path}: is not a byte-pair tokenizer") from None
    return checked_vocabulary(path, vocabulary), merges


def added_of(stored: Mapping[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in stored.get("added_tokens") or []}


def read_added(folder: Path) -> dict[str, int]:
    """The tokens that were added to a finished vocabulary, from whichever of the three files tells them."""
    added: dict[str, int] = {}
    try:
        if (folder / "tokenizer.json").exists():
            added |= added_of(read_json_object(folder / "tokenizer.json"))
        if (folder / "added_tokens.json").exists():
            added |= read_json_object(folder / "added_tokens.json")
        if (folder / "tokenizer_config.json").exists():
            settings = read_json(folder / "tokenizer_config.json")
            listed = settings.get("added_tokens_decoder", {}) if isinstance(settings, dict) else {}
            added |= {token["content"]: int(index) for index, token in listed.items()}
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{folder}: its added tokens are not a table from tokens to ids") from None
    checked_names(folder, list(added))
    return added


def checked_names(where: Path | str, added: Any) -> list[str]:
    if not isinstance(added, list) or not all(isinstance(token, str) and token for token in added):
        raise CheckpointError(f"{where}: its added tokens are not a list of texts")
    return added


def read_settings(folder: Path) -> dict[str, Any]:
    """The padding token and the context length, from whichever of the two settings files tells them."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        stored = read_json(folder / name) if (folder / name).exists() else {}
        settings |= stored if isinstance(stored, dict) else {}
    pad = settings.get("pad_token", END)
    pad = pad.get("content", END) if isinstance(pad, dict) else pad
    return checked_settings(folder, pad, settings.get("model_max_length", 77))


def checked_settings(where: Path | str, pad: Any, length: Any) -> dict[str, Any]:
    if not isinstance(pad, str) or isinstance(length, bool) or not isinstance(length, int) or not 2 < length < 1 << 16:
        stated = shown(f"{pad!r}, {length!r}")
        raise CheckpointError(f"{where}: pad_token or model_max_length is impossible ({stated})")
    return {"pad_token": pad, "context_length": length}


def write_folder(tokenizer: "CLIPTokenizer", folder: str | os.PathLike[str]) -> None:
    """Write the files that transformers and diffusers read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": tokenizer.pad_token}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.context_length, **special}
    added = {token: tokenizer.vocabulary[token] for token in tokenizer.added}
    plain = {token: index for token, index in tokenizer.vocabulary.items() if token not in added}
    texts = {
        "vocab.json": json.dumps(plain, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *lines(tokenizer.merges), ""]),  # no empty line: it would be a merge
        "tokenizer_config.json": json.dumps(settings, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
        **({"added_tokens.json": json.dumps(added, ensure_ascii=False, indent=2)} if added else {}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def lines(merges: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{left} {right}" for left, right in merges]


# ---- one text ----------------------------------------------------------------------------------------------------


def to_json(tokenizer: "CLIPTokenizer") -> str:
    """Everything that makes a tokenizer, as one text; `from_json` reads it."""
    stored = {
        "vocabulary": tokenizer.vocabulary,
        "merges": lines(tokenizer.merges),
        "pad_token": tokenizer.pad_token,
        "context_length": tokenizer.context_length,
        "added": tokenizer.added,
    }
    return json.dumps(stored, ensure_ascii=False)


def from_json(text: str, where: Path | str = "metadata") -> TokenizerData:
    """What `to_json` wrote. Raises CheckpointError for anything else."""
    try:
        stored = json.loads(text)
        merges = [(left, right) for left, _, right in (line.partition(" ") for line in stored["merges"])]
        vocabulary = checked_vocabulary(where, stored["vocabulary"])
        settings = checked_settings(where, stored["pad_token"], stored["context_length"])
        added = checked_names(where, stored.get("added", []))
        return checked(where, TokenizerData(vocabulary, merges, **settings, added=added))
    except CheckpointError:
        raise
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{where}: broken tokenizer in the file's metadata") from None
