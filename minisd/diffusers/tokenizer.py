"""transformers' `CLIPTokenizer`, as programs over diffusers use it: minisd's own, and the answers that it lacks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

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

    IDLE: ClassVar[dict[str, tuple[Any, ...]]] = {"add_special_tokens": (True,), "return_attention_mask": (None, True)}
    CHOICES: ClassVar[dict[str, tuple[Any, ...]]] = {
        "padding": (True, False, "longest", "max_length"),
        "truncation": (True, False, None),
        "return_tensors": (None, "pt"),
    }

    def __init__(self, core: tokenizer.CLIPTokenizer) -> None:
        if not isinstance(core, tokenizer.CLIPTokenizer):
            raise NotCoveredError("CLIPTokenizer(...) is not covered by minisd.diffusers: use from_pretrained")
        self.hold(core)

    def hold(self, core: tokenizer.CLIPTokenizer) -> None:
        """Answer as this tokenizer of minisd from now on."""
        for name in ("_endless", "_token_of"):  # what was worked out of another
            self.__dict__.pop(name, None)
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
        truncation: bool | None = False,
        return_tensors: str | None = None,
        **others: Any,
    ) -> Output:
        """One text or a list -> `.input_ids` and `.attention_mask`: lists, or (B, T) int64 for `return_tensors="pt"`.

        `padding`: "max_length", "longest" or True, False. `max_length`: default the model's 77. Raises
        NotCoveredError for other values.
        """
        accept("tokenizer", others, self.IDLE, parameters(self.__call__))
        choices = {"padding": padding, "truncation": truncation, "return_tensors": return_tensors}
        accept("tokenizer", choices, self.CHOICES, [])
        length = self.model_max_length if max_length is None else max_length
        rows = [self.encode(one, length if truncation else None) for one in ([text] if isinstance(text, str) else text)]
        width = {"max_length": length, False: 0}.get(padding, max(map(len, rows), default=0))
        ids = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        if return_tensors == "pt":
            return Output(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
        alone = isinstance(text, str)
        return Output(input_ids=ids[0] if alone else ids, attention_mask=mask[0] if alone else mask)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """The ids of one text, start and end included; cut to `max_length`, the end kept."""
        ids = [self.core.vocabulary[token] for token in self._endless.tokens(text)]
        if len(ids) == self._endless.context_length:
            raise NotCoveredError(
                f"tokenizer: texts of {len(ids):,} tokens and more are not covered by minisd.diffusers"
            )
        return ids if max_length is None or len(ids) <= max_length else [*ids[: max_length - 1], self.eos_token_id]

    @cached_property
    def _endless(self) -> tokenizer.CLIPTokenizer:
        """The same tokenizer for texts of any length, or almost: programs ask what a limit cuts off."""
        core = self.core
        return tokenizer.CLIPTokenizer(
            core.vocabulary, core.merges, pad_token=core.pad_token, context_length=4096, added=core.added
        )

    def tokenize(self, text: str) -> list[str]:
        """The tokens of one text as they read, without start and end; "</w>" ends a word."""
        return self.convert_ids_to_tokens(self.encode(text)[1:-1])

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """Ids, or one id -> text: bytes joined again, a space after each word."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        tokens = self.convert_ids_to_tokens([ids] if isinstance(ids, int) else ids)
        return joined([token for token in tokens if not (skip_special_tokens and token in self._special)])

    def batch_decode(self, sequences: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

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
        return len(self.core.vocabulary)

    def __len__(self) -> int:
        return self.vocab_size

    def __getattr__(self, name: str) -> NoReturn:
        raise missing(self, name)


def joined(tokens: list[str]) -> str:
    """Tokens -> text. Each of their signs stands for one byte; "</w>" is a space, but not at the end of all."""
    symbols = tokenizer.byte_symbols()
    unprintable = [byte for byte in range(256) if chr(byte) not in symbols]
    byte_of = {symbol: ord(symbol) if ord(symbol) < 256 else unprintable[ord(symbol) - 256] for symbol in symbols}
    text = bytes(byte_of[symbol] for token in tokens for symbol in token).decode("utf-8", errors="replace")
    return text.replace("</w>", " ").strip()
