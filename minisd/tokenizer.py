"""Text -> 77 token ids: CLIP's byte-pair encoding.

In: a list of prompts. Out: ids (B, 77) int64: a start token, the prompt's tokens, an end token, padding. The merging is
done by the `tokenizers` library; this file gives it CLIP's rules and vocabulary. Next in the walk: `text_encoder.py`.
"""

import gzip
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from minisd.checkpoint.errors import CheckpointError
from minisd.checkpoint.textfiles import read_json, read_text

START, END = "<|startoftext|>", "<|endoftext|>"

# Words are runs of letters, single digits, runs of other signs, and the endings of English contractions.
# Radford et al. 2021; the pattern is part of the vocabulary: other cuts would ask for tokens that were never trained.
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class CLIPTokenizer:
    """Lower-case, byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) whose words end in `</w>`."""

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        pad_token: str,
        context_length: int,
        added: Sequence[str] = (),
    ) -> None:
        """`vocabulary` maps tokens to ids; `merges` are pairs in the order in which they are applied.

        `added`: tokens of the vocabulary that are found as they stand, whatever their case, before words are cut
        (textual inversion). Where "name_1", "name_2", ... were added too, "name" in a prompt means all of them.
        """
        self.vocabulary, self.merges = vocabulary, merges
        self.pad_token, self.context_length, self.added = pad_token, context_length, tuple(added)
        for token in (START, END, pad_token, *added):
            if token not in vocabulary:
                raise CheckpointError(f"the tokenizer's vocabulary has no {token!r}")
        try:
            model = models.BPE(vocab=vocabulary, merges=merges, unk_token=END, end_of_word_suffix="</w>")
        except Exception as error:  # the library raises a bare Exception for a merge of unknown tokens
            raise CheckpointError(f"the tokenizer's vocabulary and merges disagree: {error}") from None
        self._bpe = Tokenizer(model)
        self._bpe.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        self._bpe.post_processor = processors.RobertaProcessing(
            (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
        )
        self._bpe.add_special_tokens(list(dict.fromkeys((START, END, pad_token))))
        self._bpe.add_tokens([AddedToken(token, normalized=True) for token in self.added])
        self._bpe.enable_truncation(context_length)
        self._bpe.enable_padding(length=context_length, pad_id=vocabulary[pad_token], pad_token=pad_token)

    @classmethod
    @cache
    def clip(cls) -> "CLIPTokenizer":
        """CLIP's own vocabulary of 49,408 tokens, which Stable Diffusion 1.5 uses; it is part of this package."""
        with resources.files("minisd").joinpath("data/clip_merges.txt.gz").open("rb") as file:
            lines = gzip.decompress(file.read()).decode("utf-8").split("\n")
        merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
        return cls(vocabulary_of(merges), merges, pad_token=END, context_length=77)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> "CLIPTokenizer":
        """Read a `tokenizer/` folder: `tokenizer.json`, or `vocab.json` and `merges.txt`.

        Raises CheckpointError for missing or broken files.
        """
        folder = Path(folder)
        if (folder / "tokenizer.json").is_file():
            vocabulary, merges = read_tokenizer_json(folder / "tokenizer.json")
        else:
            vocabulary, merges = read_vocabulary(folder / "vocab.json"), read_merges(folder / "merges.txt")
        settings = read_settings(folder)
        own = {START, END, settings["pad_token"]}
        added = {token: index for token, index in read_added(folder).items() if token not in own}
        vocabulary = checked_vocabulary(folder, {**vocabulary, **added})
        try:
            return cls(vocabulary, merges, added=list(added), **settings)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Encode `texts` (B strings, or one) -> ids (B, 77) int64, cut or padded to the context length.

        Raises ValueError for text that is not valid Unicode (a lone surrogate).
        """
        texts = [texts] if isinstance(texts, str) else texts
        for text in texts:
            check_unicode(text)
        texts = [self.spelt_out(text) for text in texts]
        return torch.tensor([encoding.ids for encoding in self._bpe.encode_batch(texts)], dtype=torch.int64)

    def tokens(self, text: str) -> list[str]:
        """The tokens of one prompt as they read, start and end included, padding not. Raises ValueError as above."""
        check_unicode(text)
        encoding = self._bpe.encode(self.spelt_out(text))
        return [token for token, kept in zip(encoding.tokens, encoding.attention_mask, strict=True) if kept]

    def spelt_out(self, text: str) -> str:
        """`text` with "name name_1 name_2" for each added "name" that has several vectors."""
        if not self.added:
            return text
        longest_first = sorted(self.added, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, longest_first)), self._all_of, text, flags=re.IGNORECASE)

    def _all_of(self, found: re.Match[str]) -> str:
        tokens, number = [found[0]], 1
        lower = found[0].lower()
        numbered = {token.lower(): token for token in self.added}
        while f"{lower}_{number}" in numbered:
            tokens.append(numbered[f"{lower}_{number}"])
            number += 1
        return " ".join(tokens)

    def to_json(self) -> str:
        """Everything that makes this tokenizer, as one text; `from_json` reads it."""
        merges = [f"{left} {right}" for left, right in self.merges]
        settings = {"pad_token": self.pad_token, "context_length": self.context_length, "added": self.added}
        return json.dumps({"vocabulary": self.vocabulary, "merges": merges, **settings}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "CLIPTokenizer":
        """The tokenizer that `to_json` wrote. Raises CheckpointError for anything else."""
        try:
            stored = json.loads(text)
            merges = [(left, right) for left, _, right in (line.partition(" ") for line in stored["merges"])]
            vocabulary = checked_vocabulary("metadata", stored["vocabulary"])
            settings = checked_settings("metadata", stored["pad_token"], stored["context_length"])
            settings["added"] = checked_names("metadata", stored.get("added", []))
            return cls(vocabulary, merges, **settings)
        except CheckpointError:
            raise
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            raise CheckpointError("broken tokenizer in the file's metadata") from None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that transformers and diffusers read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": self.pad_token}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.context_length, **special}
        merges = [f"{left} {right}" for left, right in self.merges]
        added = {token: self.vocabulary[token] for token in self.added}
        plain = {token: index for token, index in self.vocabulary.items() if token not in added}
        texts = {
            "vocab.json": json.dumps(plain, ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),  # an empty line would be refused as a merge
            "tokenizer_config.json": json.dumps(settings, indent=2),
            "special_tokens_map.json": json.dumps(special, indent=2),
            **({"added_tokens.json": json.dumps(added, ensure_ascii=False, indent=2)} if added else {}),
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"the prompt {text!r} is not valid Unicode text") from None


def byte_symbols() -> list[str]:
    """One printable sign for each of the 256 bytes: Latin-1 where it prints, else U+0100 on (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


def vocabulary_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's ids: the bytes, the bytes that end a word, one token for each merge, and the two special tokens."""
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    return {token: index for index, token in enumerate(tokens)}


def read_vocabulary(path: Path) -> dict[str, int]:
    return checked_vocabulary(path, read_json(path))


def checked_vocabulary(path: Path | str, vocabulary: Any) -> dict[str, int]:
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [None]
    if not all(isinstance(n, int) and 0 <= n < 1 << 20 for n in ids) or len(set(ids)) != len(ids):
        raise CheckpointError(f"{path}: is not a table from tokens to different ids")
    return vocabulary


def read_merges(path: Path) -> list[tuple[str, str]]:
    """merges.txt: one pair a line; a first line that says "#version" is a comment."""
    lines = read_text(path).split("\n")
    rows = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if not all(len(row) == 2 for row in rows):
        raise CheckpointError(f"{path}: is not a list of pairs")
    return [(left, right) for left, right in rows]


def read_tokenizer_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """tokenizer.json: the vocabulary with later additions, and the merges in either of their spellings."""
    stored = read_json(path)
    try:
        model = stored["model"]
        vocabulary = {**model["vocab"], **added_of(stored)}
        rows = [row.split(" ") if isinstance(row, str) else row for row in model["merges"]]
        merges = [(left, right) for left, right in rows]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path}: is not a byte-pair tokenizer") from None
    return checked_vocabulary(path, vocabulary), merges


def added_of(stored: dict[str, Any]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in stored.get("added_tokens") or []}


def read_added(folder: Path) -> dict[str, int]:
    """The tokens that were added to a finished vocabulary, from whichever of the three files tells them."""
    added: dict[str, int] = {}
    try:
        if (folder / "tokenizer.json").is_file():
            added |= added_of(read_json(folder / "tokenizer.json"))
        if (folder / "added_tokens.json").is_file():
            added |= read_json(folder / "added_tokens.json")
        if (folder / "tokenizer_config.json").is_file():
            settings = read_json(folder / "tokenizer_config.json")
            listed = settings.get("added_tokens_decoder", {}) if isinstance(settings, dict) else {}
            added |= {token["content"]: int(index) for index, token in listed.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: its added tokens are not a table from tokens to ids") from None
    checked_names(folder, list(added))
    return added


def checked_names(folder: Path | str, added: Any) -> list[str]:
    if not isinstance(added, list) or not all(isinstance(token, str) and token for token in added):
        raise CheckpointError(f"{folder}: its added tokens are not a list of texts")
    return added


def read_settings(folder: Path) -> dict[str, Any]:
    """The padding token and the context length, from whichever of the two settings files tells them."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        stored = read_json(folder / name) if (folder / name).is_file() else {}
        settings |= stored if isinstance(stored, dict) else {}
    pad = settings.get("pad_token", END)
    pad = pad.get("content", END) if isinstance(pad, dict) else pad
    return checked_settings(folder, pad, settings.get("model_max_length", 77))


def checked_settings(folder: Path | str, pad: Any, length: Any) -> dict[str, Any]:
    if not isinstance(pad, str) or not isinstance(length, int) or not 2 < length < 1 << 16:
        raise CheckpointError(f"{folder}: pad_token or model_max_length is impossible ({pad!r}, {length!r})")
    return {"pad_token": pad, "context_length": length}
