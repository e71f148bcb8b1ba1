"""transformers' `CLIPTokenizer`, as programs over diffusers use it: minisd's own, and the answers that it lacks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from minisd import tokenizer
from minisd.checkpoint.load import load_tokenizer
from minisd.checkpoint.tokenizer_files import write_folder
from minisd.diffusers.loading import NEUTRAL, Source, folder_of_texts
from minisd.diffusers.outputs import Output
from minisd.diffusers.refusing import NotCoveredError, accept, missing, parameters

if TYPE_CHECKING:
    from typing import Self


class CLIPTokenizer:
    """`minisd.tokenizer.CLIPTokenizer`, and the answers that transformers' gives."""

    IDLE: ClassVar[dict[str, tuple[Any, ...]]] = {"return_attention_mask": (None, True), "verbose": (True, False)}
    CHOICES: ClassVar[dict[str, tuple[Any, ...]]] = {
        "padding": (True, False, "longest", "max_length", "do_not_pad"),
        "truncation": (True, False, None, "longest_first"),
        "return_tensors": (None, "pt", "np"),
    }

    def __init__(self, core: tokenizer.CLIPTokenizer) -> None:
        if not isinstance(core, tokenizer.CLIPTokenizer):
            raise NotCoveredError("CLIPTokenizer(...) is not covered by minisd.diffusers: use from_pretrained")
        self.hold(core)

    def hold(self, core: tokenizer.CLIPTokenizer) -> None:
        """Answer as this tokenizer of minisd from now on."""
        self.__dict__.pop("_token_of", None)  # worked out of another
        self.core = core
        self.model_max_length = core.context_length
        self.bos_token, self.eos_token, self.unk_token = tokenizer.START, tokenizer.END, tokenizer.END
        self.pad_token = core.pad_token
        self.bos_token_id, self.eos_token_id = core.vocabulary[self.bos_token], core.vocabulary[self.eos_token]
        self.pad_token_id = core.vocabulary[self.pad_token]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Source, subfolder: str | None = None, **others: Any
    ) -> Self:
        """The tokenizer in a folder or hub repository, or in its `subfolder`. Raises CheckpointError."""
        accept("CLIPTokenizer.from_pretrained", others, NEUTRAL, parameters(cls.from_pretrained))
        return cls(load_tokenizer(folder_of_texts(pretrained_model_name_or_path, subfolder)))

    def save_pretrained(self, save_directory: Source) -> None:
        """Write the tokenizer's files into a folder."""
        write_folder(self.core, Path(os.path.expanduser(save_directory)))

    def __call__(
        self,
        text: str | list[str],
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool | str | None = False,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        return_overflowing_tokens: bool = False,
        return_length: bool = False,
        **others: Any,
    ) -> Output:
        """One text or a list -> `.input_ids` and `.attention_mask`: lists, or (B, T) int64 for `return_tensors="pt"`.

        `padding`: "max_length", "longest" or True, "do_not_pad" or False. `max_length`: default the model's 77.
        `return_overflowing_tokens`: what truncation cuts off becomes rows of its own, `.overflow_to_sample_mapping`
        says of which text. `return_length`: `.length` of each row. Raises NotCoveredError for other values.
        """
        accept("tokenizer", others, self.IDLE, parameters(self.__call__))
        choices = {"padding": padding, "truncation": truncation, "return_tensors": return_tensors}
        accept("tokenizer", choices, self.CHOICES, [])
        length = self.model_max_length if max_length is None else max_length
        rows, sources = [], []
        for index, one in enumerate([text] if isinstance(text, str) else text):
            windows = self._windows(one, length if truncation else None, add_special_tokens)
            windows = windows if return_overflowing_tokens else windows[:1]
            rows += windows
            sources += [index] * len(windows)
        found = self._padded(rows, padding, length)
        if return_length:
            found["length"] = [len(row) for row in found["input_ids"]]
        if return_overflowing_tokens:
            found["overflow_to_sample_mapping"] = sources
        alone = isinstance(text, str) and not return_overflowing_tokens
        return as_asked(found, return_tensors, alone=alone)

    def _windows(self, text: str, length: int | None, special: bool) -> list[list[int]]:
        """The ids of one text, cut into runs of at most `length`, start and end of each included if `special`."""
        plain = not text.isascii() or len(text) > 1000
        ids = self.core.encode_fast(text) if plain else self.core.encode(text)
        ends = ([self.bos_token_id], [self.eos_token_id]) if special else ([], [])
        room = len(ids) or 1 if length is None else max(length - len(ends[0]) - len(ends[1]), 1)
        return [ends[0] + ids[at : at + room] + ends[1] for at in range(0, len(ids) or 1, room)]

    def _padded(self, rows: list[list[int]], padding: bool | str, length: int) -> dict[str, Any]:
        """Rows of one length, if asked for, and which of their tokens are not padding."""
        longest = max(map(len, rows), default=0)
        width = {"max_length": length, False: 0, "do_not_pad": 0}.get(padding, longest)
        ids = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) + [0] * (width - len(row)) for row in rows]}

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **others: Any,
    ) -> Output:
        """Pad what the tokenizer returned, one, a list of them, or a batch: the same answers as a call."""
        accept("tokenizer.pad", others, self.IDLE, parameters(self.pad))
        choices = {"padding": padding, "return_tensors": return_tensors}
        accept("tokenizer.pad", choices, self.CHOICES, [])
        several = isinstance(encoded_inputs, list | tuple)
        given = [one["input_ids"] for one in encoded_inputs] if several else encoded_inputs["input_ids"]
        rows: list[Any] = given.tolist() if isinstance(given, Tensor) else list(given)
        alone = bool(rows) and isinstance(rows[0], int)
        length = self.model_max_length if max_length is None else max_length
        return as_asked(self._padded([rows] if alone else rows, padding, length), return_tensors, alone=alone)

    def encode(self, text: str, max_length: int | None = None, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text, start and end included; cut to `max_length`, the end kept."""
        return self._windows(text, max_length, add_special_tokens)[0]

    def add_tokens(self, new_tokens: str | list[str], special_tokens: bool = False) -> int:
        """Add tokens to the vocabulary, found in texts as they stand; returns how many were new.

        `text_encoder.resize_token_embeddings(len(tokenizer))` gives them rows.
        """
        old = self.core
        several = [new_tokens] if isinstance(new_tokens, str) else [str(token) for token in new_tokens]
        fresh = [token for token in dict.fromkeys(several) if token not in old.vocabulary]
        first = 1 + max(old.vocabulary.values())
        self.hold(
            tokenizer.CLIPTokenizer(
                {**old.vocabulary, **{token: first + index for index, token in enumerate(fresh)}},
                old.merges,
                pad_token=old.pad_token,
                context_length=old.context_length,
                added=(*old.added, *fresh),
            )
        )
        return len(fresh)

    def tokenize(self, text: str) -> list[str]:
        """The tokens of one text as they read, without start and end; "</w>" ends a word."""
        return self.convert_ids_to_tokens(self.encode(text)[1:-1])

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **others: Any) -> str:
        """Ids, or one id -> text: bytes joined again, a space after each word."""
        accept("tokenizer.decode", others, {"clean_up_tokenization_spaces": (None, False)}, parameters(self.decode))
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        tokens = self.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids)
        return joined([token for token in tokens if not (skip_special_tokens and token in self._special)])

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False, **others: Any) -> list[str]:
        return [self.decode(ids, skip_special_tokens, **others) for ids in sequences]

    @property
    def _special(self) -> set[str]:
        return {self.bos_token, self.eos_token, self.pad_token}

    @cached_property
    def _token_of(self) -> dict[int, str]:
        return {index: token for token, index in self.core.vocabulary.items()}

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """One id -> its token; several -> a list."""
        return self._token_of[ids] if isinstance(ids, int) else [self._token_of[int(index)] for index in ids]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """One token -> its id; several -> a list. An unknown one has the end token's."""
        if isinstance(tokens, str):
            return self.core.vocabulary.get(tokens, self.eos_token_id)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def get_vocab(self) -> dict[str, int]:
        return dict(self.core.vocabulary)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are without added ones; `len(tokenizer)` counts those too."""
        return len(self.core.vocabulary) - len(self.core.added)

    def __len__(self) -> int:
        return len(self.core.vocabulary)

    def get_added_vocab(self) -> dict[str, int]:
        """The special tokens and the added ones, with their ids."""
        names = dict.fromkeys((self.bos_token, self.eos_token, self.pad_token, *self.core.added))
        return {name: self.core.vocabulary[name] for name in names}

    def __getattr__(self, name: str) -> NoReturn:
        raise missing(self, name)


def as_asked(found: dict[str, Any], return_tensors: str | None, *, alone: bool) -> Output:
    """Lists of rows as tensors or arrays, or as they are; of one text the row itself."""
    if return_tensors is None:
        single = {name: rows[0] if name in ("input_ids", "attention_mask") else rows for name, rows in found.items()}
        return Output(single if alone else found)
    make = torch.tensor if return_tensors == "pt" else np.array
    return Output({name: make(rows) for name, rows in found.items()})


def joined(tokens: list[str]) -> str:
    """Tokens -> text. Each of their signs stands for one byte; "</w>" is a space, but not at the end of all."""
    symbols = tokenizer.byte_symbols()
    unprintable = [byte for byte in range(256) if chr(byte) not in symbols]
    byte_of = {symbol: ord(symbol) if ord(symbol) < 256 else unprintable[ord(symbol) - 256] for symbol in symbols}
    text = bytes(byte_of[symbol] for token in tokens for symbol in token).decode("utf-8", errors="replace")
    return text.replace("</w>", " ").strip()
