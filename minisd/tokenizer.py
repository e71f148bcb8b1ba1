"""Text -> 77 token ids: CLIP's byte-pair encoding.

In: a list of prompts. Out: ids (B, 77) int64: a start token, the prompt's tokens, an end token, padding. The files of a
tokenizer are read in `checkpoint/tokenizer_files.py`. Next in the walk: `text_encoder.py`.
"""

import gzip
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from importlib import resources
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minisd.config import END as END
from minisd.config import START as START
from minisd.config import TextEncoderConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_WORD = "</w>"
MOST_KNOWN = 50_000  # words whose ids are remembered

# Words are runs of letters, single digits, runs of other signs, and the endings of English contractions (Radford et al.
# 2021). The pattern belongs to the vocabulary: other words would ask for tokens that were never trained.
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
ASCII_WORDS = re.compile(WORDS.replace(r"\p{L}", "a-zA-Z").replace(r"\p{N}", "0-9"), re.ASCII)


def clean(text: str) -> str:
    """Compose accents (NFC), make each run of white space one space, lower-case."""
    text = re.sub(r"[^\S\x1c-\x1f]+", " ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in text)  # one by one: a final sigma is like any other


def words(text: str) -> Iterator[str]:
    """Cut clean text into words. Python's `re` knows no \\p{L}: other alphabets are mapped to ASCII for the search."""
    for found in ASCII_WORDS.finditer("".join(map(kind, text))):
        word = text[found.start() : found.end()]
        # A special token in capitals is none; the reference implementation cuts what looks like one once more.
        yield from (word[:2], word[2:-2], word[-2:]) if word in (START, END) else (word,)


def kind(character: str) -> str:
    """A character for the search: ASCII itself, "a" for any other letter, "0" for a number, "." for a sign."""
    if character.isascii():
        return character
    return " " if character.isspace() else {"L": "a", "N": "0"}.get(unicodedata.category(character)[0], ".")


@cache
def byte_symbols() -> list[str]:
    """One printable character for each of the 256 bytes: Latin-1 where it prints, else U+0100 on (Radford et al. 2019).

    In the order of CLIP's ids, which is not the order of the bytes: see `symbols_by_byte`.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + n) for n in range(256 - len(printable))]


@cache
def symbols_by_byte() -> list[str]:
    """The symbol of each byte, 0 to 255."""
    symbols = byte_symbols()
    others = iter(symbols[188:])  # of the bytes that do not print
    return [chr(byte) if chr(byte) in symbols[:188] else next(others) for byte in range(256)]


def merge_pairs(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) of one word: symbols, merged pair by pair.

    `ranks` tells how early in training each pair was merged; the earliest comes first, the leftmost of equal ones.
    """
    symbols = [symbols_by_byte()[byte] for byte in word.encode()]
    symbols[-1] += END_OF_WORD
    while pairs := [(ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


def vocabulary_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's ids: the bytes, the bytes that end a word, one token for each merge, and the two special tokens."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(tokens)}


class CLIPTokenizer:
    """Lower-case, byte-level byte-pair encoding whose words end in `</w>`."""

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
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._known: dict[str, list[int]] = {}  # words that were met before
        self._special = {token: vocabulary[token] for token in (START, END, pad_token)}
        self._added = {clean(token): vocabulary[token] for token in self.added}

    @classmethod
    @cache
    def clip(cls, pad_token: str = END) -> "CLIPTokenizer":
        """CLIP's own vocabulary of 49,408 tokens, which Stable Diffusion uses; it is part of this package.

        `pad_token`: what fills the context behind the end; the end token, but "!" in SD 2.x.
        """
        with resources.files("minisd").joinpath("data/clip_merges.txt.gz").open("rb") as file:
            lines = gzip.decompress(file.read()).decode("utf-8").split("\n")
        merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
        return cls(vocabulary_of(merges), merges, pad_token=pad_token, context_length=77)

    def padded_with(self, pad_token: str) -> "CLIPTokenizer":
        """The same with another token behind the end of a prompt."""
        length, added = self.context_length, self.added
        return CLIPTokenizer(self.vocabulary, self.merges, pad_token=pad_token, context_length=length, added=added)

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Encode `texts` (B strings, or one) -> ids (B, 77) int64, cut or padded to the context length.

        Raises ValueError for text that is not valid Unicode (a lone surrogate).
        """
        return self.rows([self.ids(text) for text in ([texts] if isinstance(texts, str) else texts)])

    def rows(self, ids: list[list[int]]) -> Tensor:
        """The ids of B texts, of any length -> (B, 77) int64, cut or padded to the context length."""
        most = self.context_length - 2
        return torch.tensor([self._framed(row[:most]) for row in ids], dtype=torch.int64)

    def tokens(self, text: str) -> list[str]:
        """The tokens of one prompt as they read, start and end included, padding not. Raises ValueError as above."""
        return [self._by_id[index] for index in self.kept(text)]

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """One row of ids -> text, without special tokens and padding. What cleaning removed does not come back."""
        special = set(self._special.values())
        tokens = [self._by_id[index] for index in map(int, ids) if index not in special]
        parts = (f"{token} ".encode() if token in self.added else token_bytes(token) for token in tokens)
        return b"".join(parts).decode(errors="replace").strip()

    def windows(self, texts: list[str]) -> Tensor:
        """Encode `texts` (B strings) whole -> ids (B, n, 77) int64: windows of 75 tokens with start, end and padding.

        n is that of the longest text; those of the others are empty behind their last.
        """
        most = self.context_length - 2
        ids = [self.ids(text) for text in texts]
        count = max(1, *(-(-len(row) // most) for row in ids))
        rows = [[self._framed(row[first : first + most]) for first in range(0, count * most, most)] for row in ids]
        return torch.tensor(rows, dtype=torch.int64)

    def _framed(self, ids: list[int]) -> list[int]:
        """At most 75 ids -> 77: start, ids, end, padding."""
        row = [self.vocabulary[START], *ids, self.vocabulary[END]]
        return row + [self.vocabulary[self.pad_token]] * (self.context_length - len(row))

    def kept(self, text: str) -> list[int]:
        """The ids of a prompt between start and end, as many as the context length holds."""
        return [self.vocabulary[START], *self.ids(text)[: self.context_length - 2], self.vocabulary[END]]

    def ids(self, text: str) -> list[int]:
        """All ids of a prompt, without start and end. Raises ValueError for text that is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the prompt {text!r} is not valid Unicode text") from None
        text = self.spelt_out(text)
        # The library's Unicode tables are those of the reference implementation, and it takes texts of any length.
        fast = not text.isascii() or len(text) > 1000
        return self.encode_fast(text) if fast else self.encode(text)

    def encode(self, text: str) -> list[int]:
        """Text of any length -> its ids. Special tokens are found first, then added ones, then words are merged."""
        ids: list[int] = []
        for piece in split(text, self._special):
            if piece in self._special:
                ids.append(self._special[piece])
                continue
            for part in split(clean(piece), self._added):
                ids += [self._added[part]] if part in self._added else self._merged(part)
        return ids

    def _merged(self, text: str) -> Iterable[int]:
        """The ids of clean text; a symbol that the vocabulary lacks becomes the end token."""
        for word in words(text):
            if word not in self._known:
                if len(self._known) >= MOST_KNOWN:
                    self._known.clear()
                tokens = merge_pairs(word, self._ranks)
                self._known[word] = [self.vocabulary.get(token, self.vocabulary[END]) for token in tokens]
            yield from self._known[word]

    def encode_fast(self, text: str) -> list[int]:
        """The same ids as `encode`, by the `tokenizers` library."""
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _by_id(self) -> dict[int, str]:
        return {index: token for token, index in self.vocabulary.items()}

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

    @cached_property
    def _library(self) -> "Tokenizer":
        """`encode` in Rust."""
        return library_tokenizer(self)


def usual_padding(config: TextEncoderConfig) -> str:
    """The padding token of a text encoder: OpenCLIP pads with id 0, which is "!"."""
    return "!" if config.openclip else END


def split(text: str, tokens: Iterable[str]) -> list[str]:
    """Cut `text` before and behind each of the `tokens`, of which the longest is taken where several begin."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text) if longest_first else [text]


def token_bytes(token: str) -> bytes:
    """The bytes that a token stands for; a space where a word ends."""
    number = {symbol: byte for byte, symbol in enumerate(symbols_by_byte())}
    text = bytes(number[symbol] for symbol in token.removesuffix(END_OF_WORD) if symbol in number)
    return text + b" " if token.endswith(END_OF_WORD) else text


def library_tokenizer(tokenizer: CLIPTokenizer) -> "Tokenizer":
    """The rules above, told to the `tokenizers` library."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    library = Tokenizer(
        models.BPE(vocab=tokenizer.vocabulary, merges=tokenizer.merges, unk_token=END, end_of_word_suffix=END_OF_WORD)
    )
    library.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    cut = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.add_special_tokens(list(dict.fromkeys((START, END, tokenizer.pad_token))))
    library.add_tokens([AddedToken(token, normalized=True) for token in tokenizer.added])
    return library
